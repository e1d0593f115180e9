"""Products with a thin matrix: the first of a low-rank pair, and what the second adds."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv.keeper import Kept, kept_result
from rwkv.ops.fused import uses_kernels


def low_rank(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """x factor, [..., C] [C, R] -> [..., R], and x.

    A recomputed part may keep the product, which is small, and spare the second reading of x. What
    reads x behind this reads the x that is returned: its gradient then comes through here, where
    that of the product is added to it in one pass.
    """
    low, again = _LowRank.apply(x, factor)
    return low, again


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, factor)
        return kept_result(lambda: x @ factor, Kept.SMALL), x.detach()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_x: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        x, factor = ctx.saved_tensors
        if grad is None:
            return grad_x, None
        rows = grad.reshape(-1, grad.shape[-1])
        d_factor = None if x is None else x.reshape(-1, x.shape[-1]).T @ rows
        if grad_x is None:
            return grad @ factor.T if ctx.needs_input_grad[0] else None, d_factor
        d_x = plus_product(grad_x.reshape(-1, grad_x.shape[-1]), rows, factor.T)
        return d_x.view(grad_x.shape), d_factor


def plus_product(
    before: Tensor | None,
    low: Tensor,
    factor: Tensor,
    *,
    out: Tensor | None = None,
    activated: bool = False,
) -> Tensor:
    """before [n, columns] + low [n, rank] factor [rank, columns], all of one dtype.

    Args:
        before: None for zeros.
        low, factor: of a product of low rank.
        out: where the sum goes, contiguous; it may be `before`. None for a new tensor.
        activated: max(sum, 0)^2 in place of the sum.
    """
    if out is None:
        out = low.new_empty(low.shape[0], factor.shape[1])
    if uses_kernels(out):
        from rwkv.ops import low_rank_triton

        if low_rank_triton.fits(out, low.shape[1]):
            before = None if before is None else before.contiguous()
            low_rank_triton.plus_product(before, low.contiguous(), factor, out, activated=activated)
            return out
    if before is None:
        torch.mm(low, factor, out=out)
    else:
        torch.addmm(before, low, factor, out=out)
    return out.relu_().square_() if activated else out
