"""8-bit codes with a scale a row: what int8 and fp8 share."""

import torch
from torch import Tensor

from peft.store import Store, fill, triton_kernels
from rwkv.linear import rows_at_once

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}  # value of the largest code
# The least largest value of a row, so that a row of zeros has a scale. Gradients may be as small as
# 1e-20; what is made of it, top / TINY and TINY / top, float32 still holds as normal numbers.
TINY = 1e-30
KERNELS = "peft.rows_triton"
ADA = (8, 9)  # the first compute capability with 8-bit floats


class RowStore(Store):
    """A weight as 8-bit codes with one float32 scale a row.

    A row's largest value has the largest code. The kind is a key of CODES.
    """

    GROUP = 1

    codes: Tensor  # [out, in]
    scale: Tensor  # [out, 1], float32

    @staticmethod
    def size(kind: str, out_features: int, in_features: int) -> int:
        return out_features * in_features + 4 * out_features

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scale = rounded_rows(self.kind, weight)
        return {"codes": codes, "scale": scale}

    def dense(self, dtype: torch.dtype) -> Tensor:
        kernels = triton_kernels(KERNELS, self.kind, self.codes)
        if kernels is not None:
            out: Tensor = kernels.unpack(self.codes, self.scale, dtype)
            return out
        dense = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        slices = (part.split(rows_at_once(self.shape[1])) for part in (self.codes, self.scale))
        fill((dense,), ((codes.float().mul_(scale),) for codes, scale in zip(*slices, strict=True)))
        return dense


def rounded_rows(kind: str, x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of x's rows and the scale of each; on a GPU the same as on a CPU, bit for bit.

    Args:
        kind: a key of CODES.
        x: [M, K], of any float dtype.
        factor: what its columns are multiplied by first, [1, K], float32; None for ones.

    Returns:
        codes [M, K], and scale [M, 1], float32.
    """
    dtype, top = CODES[kind], LARGEST[kind]
    kernels = triton_kernels(KERNELS, kind, x) if _kernel_writes(dtype, x.device) else None
    if kernels is not None:
        return kernels.round_rows(x, factor, largest=top, tiny=TINY, dtype=dtype)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    slices = x.split(rows_at_once(x.shape[1]))
    fill((codes, scale), (_rounded(some, factor, top, dtype) for some in slices))
    return codes, scale


def _rounded(
    x: Tensor, factor: Tensor | None, top: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `rounded_rows`, in plain torch, where each number takes 12 bytes on the way."""
    x = x.float()
    if factor is not None:
        x = x * factor
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    # torch divides by a number in one way on a CPU and in another on a GPU
    values = (x * (largest.reciprocal() * top)).clamp_(-top, top)
    return (values if dtype.is_floating_point else values.round_()).to(dtype), largest * (1 / top)


def transposed(kind: str, codes: Tensor) -> Tensor:
    """Codes [M, N] as [N, M], contiguous."""
    kernels = triton_kernels(KERNELS, kind, codes)
    return codes.T.contiguous() if kernels is None else kernels.transpose(codes)


def _kernel_writes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a Triton kernel can write such codes there."""
    whole = not dtype.is_floating_point
    return device.type == "cuda" and (whole or torch.cuda.get_device_capability(device) >= ADA)
