"""Host memory for what the backward pass will want, on a stream of its own."""

import weakref
from collections import deque
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

BEHIND = 2  # pieces after which the memory of what has left is free again


class HostBuffers:
    """Host memory that stays, for graphs: each replay copies to where the recorded pass did.

    Within a block, which runs one forward pass, every HostPlace takes its memory from here. Passes
    that never run at a time share it, each from the first buffer on.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._recorded: list[Tensor] = []  # where graphs copy to, outgrown ones too
        self._taken = 0

    def __enter__(self) -> None:
        self._taken = 0
        self._before = _buffers.set(self)

    def __exit__(self, *_: object) -> None:
        _buffers.reset(self._before)

    def room_for(self, x: Tensor) -> Tensor:
        """An uninitialized tensor like x, the next one of this pass."""
        size, n = x.numel() * x.element_size(), self._taken
        if n == len(self._buffers) or self._buffers[n].numel() < size:
            new = torch.empty(size, dtype=torch.uint8, pin_memory=x.is_cuda)
            self._buffers[n : n + 1] = [new]
        if torch.cuda.is_current_stream_capturing():
            self._recorded.append(self._buffers[n])
        self._taken += 1
        return self._buffers[n][:size].view(x.dtype).view(x.shape)


_buffers: ContextVar[HostBuffers | None] = ContextVar("buffers", default=None)


class HostPlace:
    """Where tensors kept by pieces of a forward pass wait for the backward pass.

    On a GPU the copies run on a stream of their own, from and to pinned memory, beside the pieces:
    out while the piece runs, back while the piece behind it is differentiated. Torch takes pinned
    memory from what earlier steps have freed. The GPU's memory becomes free in the order of its
    work, however far the host is ahead of that: a few pieces' tensors are there at once.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pieces: list[list[weakref.ref[_Kept]]] = []
        self._leaving: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()

    def of_piece(self, *resident: Tensor | None) -> AbstractContextManager[Any]:
        """Within the block, which runs one piece, what is kept for it goes to host memory.

        Args:
            resident: what stays on the device, for other pieces read it too.
        """
        self._pieces.append([])
        self._resident = {x.data_ptr() for x in resident if x is not None}
        self._let_go(len(self._pieces) - 1 - BEHIND)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, x: Tensor) -> "Tensor | _Kept":
        small = not x.is_floating_point() or x.device.type != self._device.type  # token ids
        if small or x.data_ptr() in self._resident:
            return x
        piece = len(self._pieces) - 1
        buffers = _buffers.get()
        if buffers is None:
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        else:
            host = buffers.room_for(x)
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
        if self._stream is not None:
            self._leaving.append((piece, x.detach(), self._stream.record_event()))
        kept = _Kept(host, piece)
        self._pieces[-1].append(weakref.ref(kept))
        return kept

    def _unpack(self, kept: "Tensor | _Kept") -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._let_go(len(self._pieces))
        if kept.arriving is None:
            self._bring([kept])
        x = kept.take()
        if kept.piece > 0:
            before, self._pieces[kept.piece - 1] = self._pieces[kept.piece - 1], []
            self._bring([one for one in (reference() for reference in before) if one is not None])
        return x

    def _let_go(self, last: int) -> None:
        """Free what the pieces up to `last` have sent, once the device's work so far is done."""
        while self._leaving and self._leaving[0][0] <= last:
            _, _, gone = self._leaving.popleft()
            torch.cuda.current_stream(self._device).wait_event(gone)

    def _bring(self, some: "list[_Kept]") -> None:
        """Begin to copy tensors back."""
        if some and self._stream is not None:  # the memory they come to may still be in use
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for kept in some:
            x = torch.empty_like(kept.host, device=self._device, pin_memory=False)
            with torch.cuda.stream(self._stream):
                x.copy_(kept.host, non_blocking=True)
            there = None if self._stream is None else self._stream.record_event()
            kept.arriving = x, there


class _Kept:
    """A tensor in host memory.

    piece: which one it is kept for.
    arriving: its copy on the device, and the event before which that is not whole; None while no
        copy has been asked for.
    """

    def __init__(self, host: Tensor, piece: int):
        self.host, self.piece = host, piece
        self.arriving: tuple[Tensor, torch.cuda.Event | None] | None = None

    def take(self) -> Tensor:
        """The copy on the device, for work from here on."""
        assert self.arriving is not None
        (x, there), self.arriving = self.arriving, None
        if there is not None:
            torch.cuda.current_stream(x.device).wait_event(there)
        return x

    def __del__(self) -> None:
        if self.arriving is not None:  # nobody may write to its memory before the copy has
            self.take()
