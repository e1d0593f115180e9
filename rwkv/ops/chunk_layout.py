"""Rows or packed texts cut into chunks of one size, ordered for a scan over time.

The torch backends compute what is local to a chunk for many chunks at once and then walk the
chunks of each sequence. With the sequences sorted by length, longest first, and the chunks
ordered by time, step c of the walk touches the first n_c sequences, and their c-th chunks lie side
by side; short texts simply leave the walk early.
"""

import math
import threading
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv.ops.packing import text_lengths

# About how many chunk-heads are worked on at once. On a CPU larger parts leave the caches (a
# chunk-head of 32 tokens and 64 channels works in 250 kB), on a GPU smaller ones leave it idle;
# either way the memory worked in does not grow with T.
LIMIT_CPU, LIMIT = 48, 1024


class Part(NamedTuple):
    """Neighbouring steps of the walk that are worked on at once.

    rows: which chunk-heads (a chunk of one head) they cover.
    steps: the number of chunk-heads of each step.
    """

    rows: slice
    steps: list[int]

    def walk(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors' rows, step by step; each tensor has all rows of the part."""
        return list(zip(*(t.split(self.steps) for t in tensors), strict=True))


class ChunkLayout:
    """Where each token lies among the chunks, and back.

    Attributes:
        H, C: heads, tokens in a chunk.
        parts: the walk, in order.
        real: false for the rows that only fill up a text's last chunk, [P, C, 1]; None if there
            are none. They show their text's last token, never another text's.
    """

    def __init__(self, lengths: tuple[int, ...], H: int, C: int, device: torch.device):
        length = torch.tensor(lengths)
        # Sequences of one length of whole chunks need no index: a view has all chunks in order.
        self._even = len(set(lengths)) == 1 and lengths[0] % C == 0
        self._sequences = len(lengths)
        first = length.cumsum(0) - length  # of each sequence's tokens
        length, order = length.sort(descending=True, stable=True)
        first, chunks = first[order], (length + C - 1) // C
        alive = chunks > torch.arange(int(chunks[0])).unsqueeze(1)  # [steps, Q]
        step, rank = alive.nonzero(as_tuple=True)  # of each chunk, by time
        position = step.unsqueeze(1) * C + torch.arange(C)  # [chunks, C], within the sequence
        real = position < length[rank].unsqueeze(1)
        token = first[rank].unsqueeze(1) + position.minimum(length[rank].unsqueeze(1) - 1)
        place = torch.empty(int(length.sum()), dtype=torch.long)
        place[token[real]] = (torch.arange(len(step)).unsqueeze(1) * H * C + torch.arange(C))[real]

        heads = torch.arange(H)
        self.H, self.C = H, C
        # For each row of the chunks [P C, N] its row of [B T H, N], and the other way round.
        self._source = (token.unsqueeze(1) * H + heads.view(H, 1)).flatten().to(device)
        self._place = (place.unsqueeze(1) + heads * C).flatten().to(device)
        self.real = None if real.all() else real.repeat_interleave(H, 0).unsqueeze(-1).to(device)
        self._order = order.to(device)
        self._rank = order.argsort().to(device)
        self.parts = _parts(
            [n * H for n in alive.sum(1).tolist()], LIMIT_CPU if device.type == "cpu" else LIMIT
        )

    def chunks(self, x: Tensor, part: Part, out: Tensor, *, blank: bool = False) -> Tensor:
        """Fill `out` [P, C, N] with a part's rows of x [B, T, H, N], zeros where not real if
        `blank`, and return it."""
        if self._even:
            chunks = self._view(x.contiguous(), part)
            out.unflatten(0, chunks.shape[:3]).copy_(chunks)
            return out
        source = self._source[part.rows.start * self.C : part.rows.stop * self.C]
        out.copy_(x.reshape(-1, x.shape[-1]).index_select(0, source).unflatten(0, (-1, self.C)))
        if blank and self.real is not None:
            out *= self.real[part.rows]
        return out

    def tokens(self, like: Tensor) -> "Tokens":
        """Room for what the parts' chunks become in the shape [B, T, H, N] and dtype of `like`."""
        return Tokens(self, like)

    def _view(self, x: Tensor, part: Part) -> Tensor:
        """A part's rows of x [B, T, H, N], [steps, sequences, H, C, N]."""
        x = x.view(self._sequences, -1, self.C, self.H, x.shape[-1]).permute(1, 0, 3, 2, 4)
        width = self._sequences * self.H
        return x[part.rows.start // width : part.rows.stop // width]

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """New memory for all chunks, [P, *shape], in the dtype of `like`."""
        return like.new_empty(len(self._source) // self.C, *shape)

    def sorted(self, state: Tensor) -> Tensor:
        """States [Q, H, N, N] in the order of the walk, a new [Q H, N, N]."""
        return state[self._order].flatten(0, 1)

    def sorted_gradient(self, grad: Tensor | None, like: Tensor) -> Tensor:
        """As `sorted`, of states like `like` [P, N, N]; zeros where nothing read them."""
        if grad is None:
            return like.new_zeros(self._sequences * self.H, *like.shape[1:])
        return self.sorted(grad)

    def unsorted(self, state: Tensor) -> Tensor:
        """[Q H, N, N] in the order of the walk as [Q, H, N, N]."""
        return state.unflatten(0, (-1, self.H))[self._rank]


class Tokens:
    """Chunks [P, C, N] on their way to [B, T, H, N], part by part."""

    def __init__(self, layout: ChunkLayout, like: Tensor):
        self._layout = layout
        self._out = torch.empty_like(like, memory_format=torch.contiguous_format)
        self._chunks = None if layout._even else layout.empty(like, layout.C, like.shape[-1])

    def add(self, part: Part, chunks: Tensor) -> None:
        if self._chunks is None:
            to = self._layout._view(self._out, part)
            to.copy_(chunks.unflatten(0, to.shape[:3]))
        else:
            self._chunks[part.rows] = chunks

    def all(self) -> Tensor:
        """All that was added, in any order."""
        if self._chunks is not None:
            rows, out = self._chunks.flatten(0, 1), self._out.view(-1, self._out.shape[-1])
            torch.index_select(rows, 0, self._layout._place, out=out)
        return self._out


class Room:
    """Memory that a part works in and the next part overwrites: it stays in a CPU's caches, and
    new memory is slow."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._tensors: list[Tensor] = []
        self._taken = 0

    def __call__(self, *shape: int) -> Tensor:
        """A tensor of any contents; every part asks for about the same ones in the same order."""
        size, i = math.prod(shape), self._taken
        if i == len(self._tensors) or self._tensors[i].numel() < size:
            with torch.inference_mode(False):  # a later call may need gradients
                new = torch.empty(size, dtype=self._dtype, device=self._device)
            self._tensors[i : i + 1] = [new]
        self._taken += 1
        return self._tensors[i][:size].view(shape)

    def clear(self) -> None:
        """Begin a part: nothing handed out so far is needed any more."""
        self._taken = 0


class _Rooms(threading.local):
    """Each thread's rooms on the CPU."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Room] = {}


_rooms = _Rooms()


def room_like(x: Tensor) -> Room:
    """Room of x's dtype and device for one call; on a CPU, which takes long to hand out new
    memory, the thread's next call has it again."""
    if x.device.type != "cpu":
        return Room(x.dtype, x.device)
    return _rooms.by_dtype.setdefault(x.dtype, Room(x.dtype, x.device))


@lru_cache(maxsize=4)
def _layout(lengths: tuple[int, ...], H: int, C: int, device: torch.device) -> ChunkLayout:
    with torch.inference_mode(False):  # a later call may need gradients
        return ChunkLayout(lengths, H, C, device)


def chunk_layout(x: Tensor, cu_seqlens: Tensor | None, C: int) -> ChunkLayout:
    """The layout of x [B, T, H, N], or of the texts packed in it, in chunks of C tokens, or of the
    power of two that holds the longest text if that is fewer.

    It is kept for the other layers, which ask for the same.
    """
    B, T, H, _ = x.shape
    lengths = [T] * B if cu_seqlens is None else text_lengths(cu_seqlens)
    return _layout(tuple(lengths), H, min(C, 1 << (max(lengths) - 1).bit_length()), x.device)


def _parts(steps: list[int], limit: int) -> list[Part]:
    parts: list[Part] = []
    taken: list[int] = []
    begin = total = 0
    for n in steps:
        if taken and total + n > limit:
            parts.append(Part(slice(begin, begin + total), taken))
            begin, taken, total = begin + total, [], 0
        taken.append(n)
        total += n
    parts.append(Part(slice(begin, begin + total), taken))
    return parts
