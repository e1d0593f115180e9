"""A long batch in pieces, with the state handed on: memory of one piece, gradient of the whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv.batch import TokenBatch
from rwkv.state import LayerState, State

Sums = Callable[[Tensor, TokenBatch], Tensor]


@dataclass(frozen=True)
class ChunkPlan:
    """How to walk a long batch.

    length: tokens of a piece.
    truncated: cut the gradient where pieces meet, as truncated backpropagation does; otherwise it
        is the gradient of the whole sequence.
    offload: keep the states between pieces in host memory until the backward pass wants them.
    """

    length: int
    truncated: bool = False
    offload: bool = False


def walk(model: Any, batch: TokenBatch, sums: Sums, plan: ChunkPlan | None) -> Tensor:
    """Run the model over a batch and add up what `sums` makes of its hidden states.

    With a plan, each piece is recomputed in the backward pass from the state before it, so that
    only one piece's activations exist at a time.

    Args:
        model: `model(tokens, state, cu_seqlens) -> (hidden, state)`.
        batch: rows, or texts packed into one row.
        sums: (hidden [B, t, C], the piece of the batch) -> quantities that add up over pieces.
        plan: None to run the batch in one piece.

    Returns:
        what `sums` returns, added over the pieces.
    """
    T = batch.inputs.shape[1]
    if plan is None or T <= plan.length:
        hidden, _ = model(batch.inputs, None, batch.cu_seqlens)
        return sums(hidden, batch)

    def run(piece: TokenBatch, carried: State | None, continues: bool) -> tuple[Tensor, State]:
        state = None if carried is None else _arrived(carried, batch.inputs.device)
        if piece.cu_seqlens is not None:
            state = _with_new_texts(model, piece, state if continues else None)
        hidden, after = model(piece.inputs, state, piece.cu_seqlens)
        if piece.cu_seqlens is not None:
            after = [LayerState(*(field[-1:] for field in layer)) for layer in after]
        return sums(hidden, piece), after

    total: Tensor | None = None
    carried: State | None = None
    for start in range(0, T, plan.length):
        piece, continues = cut(batch, start, min(start + plan.length, T))
        if torch.is_grad_enabled():
            some, carried = checkpoint(run, piece, carried, continues, use_reentrant=False)
        else:
            some, carried = run(piece, carried, continues)
        if plan.truncated:
            carried = [layer.detach() for layer in carried]
        if plan.offload:
            carried = [LayerState(*(_to_host(field) for field in layer)) for layer in carried]
        total = some if total is None else total + some
    assert total is not None
    return total


def cut(batch: TokenBatch, start: int, stop: int) -> tuple[TokenBatch, bool]:
    """The tokens [start, stop) of every row, and whether its first text began before `start`."""
    inputs, targets, mask = (field[:, start:stop] for field in batch[:3])
    if batch.cu_seqlens is None:
        return TokenBatch(inputs, targets, mask, None, batch.count), start > 0
    borders = batch.cu_seqlens
    inside = borders[(borders > start) & (borders < stop)]
    ends = torch.stack([borders.new_tensor(start), borders.new_tensor(stop)])
    cu_seqlens = torch.cat([ends[:1], inside, ends[1:]]) - start
    continues = start > 0 and not bool((borders == start).any())
    return TokenBatch(inputs, targets, mask, cu_seqlens, batch.count), continues


def _with_new_texts(model: Any, piece: TokenBatch, first: State | None) -> State:
    """The state of a packed piece: `first` for its first text, if given, new ones for the rest."""
    assert piece.cu_seqlens is not None
    fresh = model.initial_state(piece.cu_seqlens.shape[0] - 1)
    if first is None:
        return fresh
    return [
        LayerState(*(torch.cat([old, new[1:]]) for old, new in zip(a, b, strict=True)))
        for a, b in zip(first, fresh, strict=True)
    ]


def _arrived(state: State, device: torch.device) -> State:
    return [
        LayerState(*(field.to(device, non_blocking=True) for field in layer)) for layer in state
    ]


class _ToHost(torch.autograd.Function):
    """Copy to pinned host memory; the gradient travels back to the device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.device = x.device
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        return host.copy_(x, non_blocking=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.device, non_blocking=True)


def _to_host(x: Tensor) -> Tensor:
    return _ToHost.apply(x)
