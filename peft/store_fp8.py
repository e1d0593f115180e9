"""8-bit floats (e4m3) with a scale a row, multiplied natively where the GPU can.

Source: FP8 Formats for Deep Learning, arXiv:2209.05433.
"""

import torch
from torch import Tensor

from peft.store_rows import ADA, RowStore, rounded_rows, transposed

SIDE = 16  # what _scaled_mm wants both sides of a weight to be multiples of


class Fp8Store(RowStore):
    """A weight as e4m3 codes with one float32 scale a row.

    On a GPU of compute capability 8.9 or later, activations are rounded to e4m3 too, with a scale
    a token, and the product runs on 8-bit tensor cores, forward and backward; elsewhere, and for
    float32 activations, the weight is dequantized. A GPU's gradient of the input carries 8-bit
    rounding as well (3 bits of mantissa).
    """

    def adds_freely(self, x: Tensor) -> bool:
        return not multiplies_natively(x, self.codes)

    def forward_product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        if not multiplies_natively(x, self.codes):
            return super().forward_product(x, into)
        out = native_product(x, self.codes, self.scale).to(x.dtype)
        return out if into is None else into.add_(out)

    def backward_product(
        self, grad: Tensor, into: Tensor | None = None, *, of_logits: bool = False
    ) -> Tensor:
        if not multiplies_natively(grad, self.codes):
            return super().backward_product(grad, into)
        out = native_gradient(grad, self.codes, self.scale).to(grad.dtype)
        return out if into is None else into.add_(out)


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
    flat = rounded_rows("fp8", x.flatten(0, -2))
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
    flat = rounded_rows("fp8", grad.flatten(0, -2), scale.T)
    columns = transposed("fp8", codes).T
    product = _scaled_product(*flat, columns, scale.new_ones(1, codes.shape[1]))
    return product.unflatten(0, grad.shape[:-1])


def _scaled_product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor) -> Tensor:
    """[M, K] times [K, N], codes with a scale a row and a column, to bfloat16.

    Sums stay in the tensor cores' own accumulators of few bits, which is a quarter faster and adds
    1.3e-3 (K = 4,096) to 3e-3 (16,384) of error to the 3.7e-2 of the roundings.
    """
    if not left.shape[0]:
        return left.new_empty(0, right.shape[1], dtype=torch.bfloat16)
    return torch._scaled_mm(
        left,
        right,
        scale_a=left_scale,
        scale_b=right_scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
