"""The gradient of wkv operators whose forward pass may keep what their backward pass wants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class WkvBytes(NamedTuple):
    """What an operator holds for its backward pass in bfloat16, bytes a token and channel.

    Of whole chunks: a text's last one, however short, takes the room of one, see `in_texts`.

    kept: from the forward pass on, beside its inputs.
    at_work: while its backward pass runs, with what this makes again and the gradients of states;
        over the 2 of those that the CUDA kernels make.
    chunk: tokens of a chunk.
    gradients: its inputs whose gradients lie in whole chunks before they lie in texts; in the
        model's dtype, and not in `at_work`.
    """

    kept: float
    at_work: float
    chunk: int
    gradients: int = 0

    def rounding(self, texts: int, tokens: int) -> float:
        """The tokens of whole chunks for each of `tokens` that are cut into `texts`."""
        return 1 + self.chunk * texts / tokens

    def in_texts(self, texts: int, tokens: int) -> "WkvBytes":
        """The same where `tokens` are cut into `texts`."""
        more = self.rounding(texts, tokens)
        return self._replace(kept=self.kept * more, at_work=self.at_work * more)


WKV_BYTES = {  # by the model's version and the backend; heads of 64 channels
    (7, "cuda"): WkvBytes(7.4, 7.4, 64),
    (7, "triton"): WkvBytes(0.0, 13.0, 32),
    (6, "cuda"): WkvBytes(2.0, 2.0, 64),
    (6, "triton"): WkvBytes(4.3, 6.3, 32),
    (7, "torch"): WkvBytes(14.0, 14.0, 32, 6),  # float32 in a model of any dtype
    (6, "torch"): WkvBytes(8.0, 8.0, 32, 4),
}


def gradients_of_states(
    grad_final: Tensor | None, r: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of S_T [Q, H, N, N], and room for that of S_0.

    Where nothing read S_T the two are one tensor of zeros: of its own part every block of a scan
    back reads all before it writes any.
    """
    if grad_final is not None:
        return grad_final, torch.empty_like(grad_final)
    B, _, H, N = r.shape
    Q = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    zeros = r.new_zeros(Q, H, N, N, dtype=torch.float32)
    return zeros, zeros


def register_gradient(forward: Any, backward: Callable[..., tuple[Tensor, ...]]) -> None:
    """Make a custom operator differentiable.

    Args:
        forward: a torch.library.custom_op of (r, w, k, v, ..., state, cu_seqlens, keep) that
            returns y, S_T and, if `keep` says so, what `backward` wants; empty tensors otherwise.
            Where nothing was kept, it runs again in the backward pass.
        backward: (r, w, k, v, ..., cu_seqlens, gradient of y, gradient of S_T, *kept) -> the
            gradients of r, w, k, v, ... and of the state; that of S_T is None where nothing read
            S_T.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, cu_seqlens, keep = inputs
        _, _, *kept = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *(kept if keep else ()))
        ctx.keep, ctx.count = keep, len(tensors)
        ctx.cu_seqlens = cu_seqlens  # itself: what is known of it is known by object

    def differentiate(
        ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: checkpointing recomputes them at each asking
        *tensors, state = saved[: ctx.count]
        kept, cu_seqlens = saved[ctx.count :], ctx.cu_seqlens
        if not ctx.keep:
            _, _, *kept = forward(*tensors, state, cu_seqlens, True)
        grad_y = torch.zeros_like(tensors[0]) if grad_y is None else grad_y.contiguous()
        grad_final = None if grad_final is None else grad_final.contiguous()
        return *backward(*tensors, cu_seqlens, grad_y, grad_final, *kept), None, None

    forward.register_autograd(differentiate, setup_context=save)
