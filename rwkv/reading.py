"""Let a model read many texts: packed end to end, in pieces of one size, states handed on."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv.model import RWKV
from rwkv.state import LayerState, State

PIECE = 4096  # tokens that a model reads at once


class Span(NamedTuple):
    """The tokens [start, stop) of one text."""

    text: int
    start: int
    stop: int


class Piece(NamedTuple):
    """What one call of the model gave.

    spans: which tokens of which texts, in their order in `hidden`.
    hidden: after each token, [T, C].
    state: after each span, Q = len(spans).
    """

    spans: list[Span]
    hidden: Tensor
    state: State


def read_texts(
    model: RWKV, texts: Sequence[Sequence[int]], state: State | None = None, piece: int = PIECE
) -> Iterator[Piece]:
    """Read texts of any lengths, at least one token each, without gradients.

    Args:
        model: what reads.
        texts: token ids.
        state: of each text before its first token, Q = len(texts); None for new texts.
        piece: tokens at once; a text may lie in several pieces.
    """
    device = model.device
    after: State = []
    for spans in _cut([len(text) for text in texts], piece):
        tokens = [token for text, start, stop in spans for token in texts[text][start:stop]]
        ends = torch.tensor([0, *(stop - start for _, start, stop in spans)]).cumsum(0)
        with torch.no_grad():
            before = _states(model, spans, state, after)
            hidden, after = model(
                torch.tensor([tokens], device=device),
                before,
                ends.to(device) if len(spans) > 1 else None,
            )
        yield Piece(spans, hidden[0], after)


def read_to_the_end(
    model: RWKV, texts: Sequence[Sequence[int]], state: State | None = None, piece: int = PIECE
) -> tuple[Tensor, State]:
    """Each text's hidden state after its last token, [Q, C], and its state; see `read_texts`."""
    hidden, states = [], []
    for spans, found, after in read_texts(model, texts, state, piece):
        whole = [n for n, span in enumerate(spans) if span.stop == len(texts[span.text])]
        ends = torch.tensor([span.stop - span.start for span in spans]).cumsum(0) - 1
        if whole:
            hidden.append(found[ends[whole].to(found.device)])
            states.append(after if len(whole) == len(spans) else select(after, whole))
    return torch.cat(hidden), join(states)


def select(state: State, rows: Sequence[int]) -> State:
    """The state of some of its sequences."""
    index = torch.tensor(rows, dtype=torch.long, device=state[0].wkv.device)
    return [layer.select(index) for layer in state]


def join(states: Sequence[State]) -> State:
    """The state of all sequences of several states."""
    if len(states) == 1:
        return states[0]
    return [
        LayerState(*(torch.cat(fields) for fields in zip(*layers, strict=True)))
        for layers in zip(*states, strict=True)
    ]


def _cut(lengths: Sequence[int], piece: int) -> Iterator[list[Span]]:
    """Texts end to end, cut after every `piece` tokens."""
    spans: list[Span] = []
    room = piece
    for text, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            spans.append(Span(text, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield spans
                spans, room = [], piece
    if spans:
        yield spans


def _states(model: RWKV, spans: list[Span], state: State | None, last: State) -> State | None:
    """What the spans start from; a text that was cut goes on from the last state of `last`."""
    begun = [span.text for span in spans if span.start == 0]
    if len(begun) == len(spans):
        if state is None or len(begun) == len(state[0].wkv):
            return state
        return select(state, begun)
    parts = [select(last, [len(last[0].wkv) - 1])]
    if begun:
        parts.append(model.initial_state(len(begun)) if state is None else select(state, begun))
    return join(parts)
