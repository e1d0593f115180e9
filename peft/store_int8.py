"""Row-wise int8 storage, multiplied as whole numbers where that is faster.

Source: LLM.int8(), arXiv:2208.07339 (a scale a row of the weight and a scale a token).
"""

from types import ModuleType

import torch
from torch import Tensor

from peft.store import triton_kernels
from peft.store_rows import RowStore, rounded_rows, transposed

SIDE = 16  # what TMA wants both sides of a weight to be multiples of
LEAST_ROWS = 17  # fewer fill no tile: unpacking the weight moves no more
HOPPER = 9  # major compute capability of the GPUs on which the product was measured


class Int8Store(RowStore):
    """A weight as int8 with one float32 scale a row.

    On a GPU of compute capability 9, half-precision activations of LEAST_ROWS tokens or more are
    rounded to int8 too, with a scale a token, and whole numbers are multiplied, forward and
    backward; fewer tokens, and those elsewhere, meet the unpacked weight. The largest error of an
    element is half a step, max|row| / 254, in float32.
    """

    def forward_product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        kernels = product_kernels(x, self.codes)
        if kernels is None:
            return super().forward_product(x, into)
        left = rounded_rows("int8", x.flatten(0, -2))
        return whole_product(kernels, *left, self.codes, self.scale, like=x, into=into)

    def backward_product(
        self, grad: Tensor, into: Tensor | None = None, *, of_logits: bool = False
    ) -> Tensor:
        """The scales of W's rows lie along the summed side: they go into the gradient.

        A gradient of logits meets the unpacked weight: rounded to whole numbers, what is below a
        254th of its largest would be lost.
        """
        kernels = None if of_logits else product_kernels(grad, self.codes)
        if kernels is None:
            return super().backward_product(grad, into)
        left = rounded_rows("int8", grad.flatten(0, -2), self.scale.T)
        columns = transposed("int8", self.codes)
        return whole_product(kernels, *left, columns, None, like=grad, into=into)


def product_kernels(x: Tensor, codes: Tensor) -> ModuleType | None:
    """The kernels that multiply whole numbers, where they can and are worth it; else None."""
    fits = (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device)[0] == HOPPER
        and x.numel() >= LEAST_ROWS * x.shape[-1]
        and all(side % SIDE == 0 for side in codes.shape)
    )
    return triton_kernels("peft.int8_triton", "int8", x) if fits else None


def whole_product(
    kernels: ModuleType,
    left: Tensor,
    row_scale: Tensor,
    right: Tensor,
    column_scale: Tensor | None,
    *,
    like: Tensor,
    into: Tensor | None,
) -> Tensor:
    """Codes [M, K] times codes [N, K], rescaled: a new tensor [..., N], or `into` += it.

    Args:
        kernels: peft.int8_triton.
        left, row_scale: as of rounded_rows.
        right: int8, contiguous.
        column_scale: float32, N values in a row of memory; None for ones.
        like: [..., K], of the result's dtype.
        into: [..., N], contiguous.
    """
    flat = None if into is None else into.view(-1, right.shape[0])
    out: Tensor = kernels.product(left, row_scale, right, column_scale, like.dtype, flat)
    return out.view(*like.shape[:-1], -1)
