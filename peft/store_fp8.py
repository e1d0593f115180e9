"""8-bit floats (e4m3) with a scale a row, multiplied natively where the GPU can.

Source: FP8 Formats for Deep Learning, arXiv:2209.05433.
"""

import torch
from torch import Tensor

from peft.store import Store

LARGEST = 448.0  # of e4m3
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

    def forward_product(self, x: Tensor) -> Tensor:
        if not multiplies_natively(x, self.codes):
            return super().forward_product(x)
        return native_product(x, self.codes.T, self.scale.T)

    def backward_product(self, grad: Tensor) -> Tensor:
        if not multiplies_natively(grad, self.codes):
            return super().backward_product(grad)
        return native_gradient(grad, self.codes, self.scale).to(grad.dtype)


def to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x and the float32 scale of each row, along the last dimension."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def multiplies_natively(x: Tensor, codes: Tensor) -> bool:
    """Whether the device has a product of 8-bit floats for these activations and this weight."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device) >= ADA
        and all(side % SIDE == 0 for side in codes.shape)
    )


def native_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x times a weight given as codes, in 8-bit floats.

    Args:
        x: [..., K], rounded to e4m3 with a scale a row.
        codes: [K, N], e4m3, stored by columns.
        scale: of each column, [1, N], float32.

    Returns:
        [..., N], in x's dtype; bfloat16 for float32.
    """
    flat, x_scale = to_e4m3(x.flatten(0, -2))
    out = torch._scaled_mm(
        flat, codes, scale_a=x_scale, scale_b=scale.contiguous(), out_dtype=torch.bfloat16
    )
    dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    return out.unflatten(0, x.shape[:-1]).to(dtype)


def native_gradient(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the input of x W^T, in 8-bit floats.

    The scales of W's rows lie along the summed side here, so they go into the gradient before it
    is rounded.

    Args:
        grad: of the output, [..., out].
        codes, scale: as Fp8Store keeps them.

    Returns:
        [..., in], bfloat16.
    """
    columns = codes.T.contiguous().T  # the product reads its second factor by columns
    return native_product(grad.float() * scale.T, columns, scale.new_ones(1, codes.shape[1]))
