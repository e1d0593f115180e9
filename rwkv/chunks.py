"""A long batch in pieces, with the state handed on: memory of one piece, gradient of the whole."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rwkv.batch import TeacherBatch, TokenBatch
from rwkv.offload import HostPlace
from rwkv.recompute import recomputed
from rwkv.scattered import most_of_all_ranks
from rwkv.state import LayerState, State

Batch = TypeVar("Batch", TokenBatch, TeacherBatch)


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


def walk(
    model: Any, batch: Batch, sums: Callable[[Any, Batch], Tensor], plan: ChunkPlan | None
) -> Tensor:
    """Run the model over a batch and add up what `sums` makes of its hidden states.

    With a plan, each piece is recomputed in the backward pass from the state before it, so that
    only one piece's activations exist at a time.

    Args:
        model: an RWKV, or what is called like one and has `initial_state(Q)`.
        batch: rows, or texts packed into one row.
        sums: (hidden [B, t, C], the piece of the batch) -> quantities that add up over pieces.
        plan: None to run the batch in one piece.

    Returns:
        what `sums` returns, added over the pieces.
    """
    T = batch.inputs.shape[1]
    pieces = _pieces(T, plan, model, batch.inputs.device)
    if plan is None or pieces == 1:
        hidden, _ = model(batch.inputs, None, batch.cu_seqlens, final_states=0)
        return sums(hidden, batch)

    def run(piece: Batch, state: State | None, continues: bool, last: bool) -> tuple[Tensor, State]:
        if piece.cu_seqlens is not None:
            state = _with_new_texts(model, len(piece.cu_seqlens) - 1, state if continues else None)
        handed_on = None if piece.cu_seqlens is None else 1
        hidden, after = model(
            piece.inputs, state, piece.cu_seqlens, final_states=0 if last else handed_on
        )
        return sums(hidden, piece), after

    total: Tensor | None = None
    carried: State | None = None
    place = HostPlace(batch.inputs.device) if plan.offload else None
    for start in range(0, pieces * plan.length, plan.length):
        if start < T:
            piece, continues = cut(batch, start, min(start + plan.length, T))
        else:
            piece, continues = _idle(batch), True
        with nullcontext() if place is None else place.of_piece():
            last = start + plan.length >= pieces * plan.length
            some, carried = recomputed(run, piece, carried, continues, last, model=model)
        if plan.truncated:
            carried = [layer.detach() for layer in carried]
        total = some if total is None else total + some
    assert total is not None
    return total


def _pieces(T: int, plan: ChunkPlan | None, model: Any, device: torch.device) -> int:
    """How many pieces to run: those of T tokens, or of the rank with the longest texts."""
    return 1 if plan is None else most_of_all_ranks(-(-T // plan.length), model, device)


def _idle(batch: Batch) -> Batch:
    """One token more for every row, which is not scored: runs along with other ranks' pieces."""
    piece = batch.columns(0, 1)
    borders = batch.cu_seqlens
    return piece._replace(
        mask=torch.zeros_like(piece.mask),
        cu_seqlens=None if borders is None else torch.arange(2, device=borders.device),
    )


def cut(batch: Batch, start: int, stop: int) -> tuple[Batch, bool]:
    """The tokens [start, stop) of every row, and whether its first text began before `start`."""
    piece = batch.columns(start, stop)
    if batch.cu_seqlens is None:
        return piece, start > 0
    borders = batch.cu_seqlens
    inside = borders[(borders > start) & (borders < stop)]
    ends = torch.stack([borders.new_tensor(start), borders.new_tensor(stop)])
    cu_seqlens = torch.cat([ends[:1], inside, ends[1:]]) - start
    continues = start > 0 and not bool((borders == start).any())
    return piece._replace(cu_seqlens=cu_seqlens), continues


def _with_new_texts(model: Any, texts: int, first: State | None) -> State:
    """The state of a packed piece: `first` for its first text, if given, new ones for the rest."""
    if first is not None and texts == 1:
        return first
    fresh = model.initial_state(texts)
    if first is None:
        return fresh
    return _followed(first, _rows(fresh, range(1, texts)))


def read(
    model: Any,
    tokens: Tensor,
    cu_seqlens: Tensor,
    state: State | None,
    plan: ChunkPlan | None,
    keep: Tensor | None = None,
    *,
    final_states: bool = True,
) -> tuple[Tensor, State]:
    """Run the model over packed texts, each from a state of its own, in pieces if there is a plan.

    Args:
        model: an RWKV, or what is called like one and has `initial_state(Q)`.
        tokens: the texts end to end, [1, T].
        cu_seqlens: where each text starts, and T, [Q + 1].
        state: of each text before its first token; None for new texts.
        plan: None to run the texts in one piece.
        keep: positions whose hidden states are wanted, [K], rising; None for all T.
        final_states: whether the texts' states are wanted.

    Returns:
        the hidden states [K, C], and each text's state after its last token, [] where none is
        wanted. Gradients flow through both, over pieces and into `state`.
    """
    T = tokens.shape[1]
    pieces = _pieces(T, plan, model, tokens.device)
    if plan is None or pieces == 1:
        hidden, after = model(tokens, state, cu_seqlens, final_states=None if final_states else 0)
        return hidden[0] if keep is None else hidden[0, keep], after

    def run(
        piece: Tensor,
        borders: Tensor,
        carried: State | None,
        fresh: State | None,
        kept: Any,
        wanted_states: int | None,
    ) -> tuple[Tensor, State]:
        state = _followed(carried, fresh) if carried and fresh else carried or fresh
        hidden, after = model(piece, state, borders, final_states=wanted_states)
        return hidden[0, kept], after

    borders = cu_seqlens.tolist()
    wanted = torch.arange(T) if keep is None else keep.cpu()
    found, ended = [], []
    carried: State | None = None
    place = HostPlace(tokens.device) if plan.offload else None
    first = 0  # the text that the piece begins in
    for start in range(0, T, plan.length):
        stop = min(start + plan.length, T)
        last = first
        while borders[last + 1] < stop:
            last += 1
        inside = [start, *borders[first + 1 : last + 1], stop]
        new = range(first + (carried is not None), last + 1)
        fresh = None
        if len(new):
            fresh = model.initial_state(len(new)) if state is None else _rows(state, new)
        whole = borders[last + 1] == stop
        kept = wanted[(wanted >= start) & (wanted < stop)] - start
        arguments = (
            tokens[:, start:stop],
            torch.tensor(inside, device=tokens.device) - start,
            carried,
            fresh,
            kept.to(tokens.device),
            None if final_states else int(not whole),
        )
        with nullcontext() if place is None else place.of_piece():
            hidden, after = recomputed(run, *arguments, model=model)
        found.append(hidden)
        done = last - first + whole
        if done and final_states:
            ended.append(_rows(after, range(done), copies=not whole))
        carried = None
        if not whole:
            carried = [layer.last(1) for layer in after] if final_states else after
            if plan.truncated:
                carried = [layer.detach() for layer in carried]
        first = last + whole
    idle = pieces - len(found)  # other ranks have more tokens to read
    for _ in range(idle):
        fresh = model.initial_state(1) if state is None else _rows(state, range(1))
        none = torch.empty(0, dtype=torch.int64, device=tokens.device)
        borders_of_one = torch.arange(2, device=tokens.device)
        idle_piece = tokens[:, :1], borders_of_one, None, fresh, none, 0
        hidden, _ = recomputed(run, *idle_piece, model=model)
        found.append(hidden)
    return torch.cat(found), _joined(ended)


def _rows(state: State, texts: range, *, copies: bool = False) -> State:
    """The state of some neighbouring texts.

    copies: in memory of its own; it would else keep the state of all texts alive.
    """
    rows = slice(texts.start, texts.stop)
    return [
        LayerState(*(field[rows].clone() if copies else field[rows] for field in layer))
        for layer in state
    ]


def _followed(carried: State, fresh: State) -> State:
    """The state of a text that goes on, and behind it those of others."""
    one = [LayerState(*(_OwnGradient.apply(field) for field in layer)) for layer in carried]
    return _joined([one, fresh])


class _OwnGradient(torch.autograd.Function):
    """The identity; its gradient is a copy.

    That of a joined tensor's part is a view, and while it waits for the chunk before it would keep
    the gradients of all texts' states alive.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


def _joined(states: list[State]) -> State:
    """The states of all texts, one after another."""
    if len(states) == 1:
        return states[0]
    return [
        LayerState(*(torch.cat(fields) for fields in zip(*layers, strict=True)))
        for layers in zip(*states, strict=True)
    ]
