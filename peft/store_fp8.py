"""8-bit floats (e4m3) with a scale a row, multiplied natively where the GPU can.

Source: FP8 Formats for Deep Learning, arXiv:2209.05433.
"""

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from peft.store import Store

LARGEST = 448.0  # of e4m3
TINY = 1e-12  # the least largest value of a row, so that a row of zeros has a scale
SIDE = 16  # what _scaled_mm wants both sides of a weight to be multiples of
ADA = (8, 9)  # the first compute capability that multiplies 8-bit floats


class Fp8Store(Store):
    """A weight as e4m3 codes with one float32 scale a row.

    On a GPU of compute capability 8.9 or later, activations are rounded to e4m3 too, with a scale
    a token, and the product runs on 8-bit tensor cores, forward and backward; elsewhere, and for
    float32 activations, the weight is dequantized. A GPU's gradient of the input carries 8-bit
    rounding as well (3 bits of mantissa).
    """

    codes: Tensor  # [out, in], float8_e4m3fn
    scale: Tensor  # [out, 1], float32

    @staticmethod
    def size(kind: str, out_features: int, in_features: int) -> int:
        return out_features * in_features + 4 * out_features

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scale = to_e4m3(weight)
        return {"codes": codes, "scale": scale}

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scale).to(dtype)

    def adds_freely(self, x: Tensor) -> bool:
        return not multiplies_natively(x, self.codes)

    def forward_product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        if not multiplies_natively(x, self.codes):
            return super().forward_product(x, into)
        out = native_product(x, self.codes, self.scale).to(x.dtype)
        return out if into is None else into.add_(out)

    def backward_product(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        if not multiplies_natively(grad, self.codes):
            return super().backward_product(grad, into)
        out = native_gradient(grad, self.codes, self.scale).to(grad.dtype)
        return out if into is None else into.add_(out)


def to_e4m3(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of x's rows and the scale of each; on a GPU the same as on a CPU, bit for bit.

    Args:
        x: [M, K], of any float dtype.
        factor: what its columns are multiplied by first, [1, K], float32; None for ones.

    Returns:
        codes [M, K], e4m3, and scale [M, 1], float32.
    """
    kernel = _kernel() if x.is_cuda and torch.cuda.get_device_capability(x.device) >= ADA else None
    if kernel is not None:
        return kernel.round_rows(x, factor, largest=LARGEST, tiny=TINY)
    x = x.float()
    if factor is not None:
        x = x * factor
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    # torch divides by a number in one way on a CPU and in another on a GPU
    codes = (x * (largest.reciprocal() * LARGEST)).clamp(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), largest * (1 / LARGEST)


def multiplies_natively(x: Tensor, codes: Tensor) -> bool:
    """Whether the device has a product of 8-bit floats for these activations and this weight."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device) >= ADA
        and all(side % SIDE == 0 for side in codes.shape)
    )


def native_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x W^T in 8-bit floats.

    Args:
        x: [..., in], rounded to e4m3 with a scale a row.
        codes, scale: as Fp8Store keeps them.

    Returns:
        [..., out], bfloat16.
    """
    flat = to_e4m3(x.flatten(0, -2))
    return _scaled_product(*flat, codes.T, scale.T).unflatten(0, x.shape[:-1])


def native_gradient(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the input of x W^T, in 8-bit floats.

    The scales of W's rows lie along the summed side here, so they go into the gradient before it
    is rounded. The product reads its second factor by columns: the codes are transposed into
    memory that is free again afterwards.

    Args:
        grad: of the output, [..., out].
        codes, scale: as Fp8Store keeps them.

    Returns:
        [..., in], bfloat16.
    """
    flat = to_e4m3(grad.flatten(0, -2), scale.T)
    columns = _transposed(codes).T
    product = _scaled_product(*flat, columns, scale.new_ones(1, codes.shape[1]))
    return product.unflatten(0, grad.shape[:-1])


def _scaled_product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor) -> Tensor:
    """[M, K] times [K, N], codes with a scale a row and a column, to bfloat16."""
    if not left.shape[0]:
        return left.new_empty(0, right.shape[1], dtype=torch.bfloat16)
    return torch._scaled_mm(
        left, right, scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16
    )


def _transposed(codes: Tensor) -> Tensor:
    """Codes [M, N] as [N, M], contiguous."""
    kernel = _kernel() if codes.is_cuda else None
    return codes.T.contiguous() if kernel is None else kernel.transpose(codes)


@cache
def _kernel() -> ModuleType | None:
    """The Triton kernels' module, or None on a machine without Triton."""
    try:
        return importlib.import_module("peft.fp8_triton")
    except ImportError:
        return None
