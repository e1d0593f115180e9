"""wkv7 in plain torch, a chunk of tokens at a time: no kernel needed, any device.

Let u_t = S_{t-1} a_t, what token t reads. In a chunk that starts from S and ends with S',

    u = (1 - A_ab)^-1 (A_ak v + a' S^T)
    y = A_rb u + A_rk v + r' S^T
    S' = S diag(kept) + u^T b" + v^T k"

where A are products between the chunk's tokens, a' and r' read from its start, b" and k" are what
is left at its end (rwkv/ops/decayed_products.py). What does not contain S is computed for many
chunks at once; the rest goes chunk after chunk, all sequences and heads together. For the backward
pass the inputs, the states at the chunks' starts, u and the inverse are kept, everything else is
computed again. The work is in float32, or in float64 where the inputs are.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv.keeper import keeping
from rwkv.ops.chunk_layout import ChunkLayout, Part, Room, chunk_layout, room_like
from rwkv.ops.decayed_products import decay_rate, decayed_products

CHUNK = 32  # on a CPU 64 takes longer; 16 saves up to a tenth and keeps twice as many states
SHORTEST = 6  # tokens from which the chunks' fixed cost is less than the steps of the reference


def why_not(sample: Tensor, packed: bool) -> str | None:
    return None


def why_slow(sample: Tensor, packed: bool) -> str | None:
    T = sample.shape[1]
    return None if T >= SHORTEST else f"{T} tokens are fewer than a chunk is worth"


def run(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _WKV7.apply(chunk_layout(v, cu_seqlens, CHUNK), state, r, w, k, v, a, b)


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: ChunkLayout, state: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, final, *kept = _forward(layout, state, *inputs)
        ctx.save_for_backward(*inputs, *kept)
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, starts, us, inverses = ctx.saved_tensors
        layout: ChunkLayout = ctx.layout
        dy = torch.zeros_like(inputs[0]) if dy is None else dy
        dS, C = layout.sorted_gradient(d_state, starts), layout.C
        room = room_like(dS)
        grads = [layout.tokens(x) for x in inputs]
        for part in reversed(layout.parts):
            room.clear()
            local = _Local(layout, part, inputs, room)
            entry_a, entry_r = local.entry
            exit_b, exit_k = local.exit
            S, u, inverse = starts[part.rows], us[part.rows], inverses[part.rows]
            local.u.copy_(u)
            # The gradients of what makes u and y: [A_ak v + a' S^T | y], and of S'.
            d_made, dS_part = room(*local.uv.shape), room(*S.shape)
            dy_part = layout.chunks(dy, part, d_made[:, C:], blank=True)
            d_u = torch.bmm(local.products[:, C:, :C].mT, dy_part, out=room(*u.shape))
            d_read, added = room(*u.shape), torch.bmm(dy_part.mT, entry_r, out=room(*S.shape))
            steps = part.walk(dS_part, local.kept, d_u, exit_b, inverse.mT, d_read, entry_a, added)
            _scan(dS, reversed(steps))
            d_made[:, :C] = d_read
            d_v = torch.bmm(exit_k, dS_part.mT, out=d_u)
            d_v.baddbmm_(local.products[:, :, C:].mT, d_made)
            (d_a, d_r), (d_b, d_k), d_rate = local.decayed.backward(
                torch.bmm(d_made, local.uv.mT, out=local.products),
                torch.bmm(d_made, S, out=room(*d_made.shape)),
                torch.bmm(local.uv, dS_part, out=room(*d_made.shape)),
                torch.mul(S, dS_part, out=added).sum(1),
            )
            d_w = d_rate.mul_(local.decayed.rate)
            for grad, value in zip(grads, (d_r, d_w, d_k, d_v, d_a, d_b), strict=True):
                grad.add(part, value)
        d_initial = layout.unsorted(dS) if ctx.needs_input_grad[1] else None
        return None, d_initial, *(grad.all() for grad in grads)


@keeping
def _forward(layout: ChunkLayout, state: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """y, S_T and what the backward pass wants: the states at the starts, u and the inverses."""
    S, room = layout.sorted(state), room_like(state)
    C, y = layout.C, layout.tokens(inputs[0])
    N = S.shape[-1]
    starts, us = layout.empty(S, N, N), layout.empty(S, C, N)
    inverses = layout.empty(S, C, C)  # (1 - A_ab)^-1
    for part in layout.parts:
        room.clear()
        local = _Local(layout, part, inputs, room)
        entry_a, entry_r = local.entry
        exit_b, exit_k = local.exit
        S_part, u, inverse = starts[part.rows], us[part.rows], inverses[part.rows]
        _invert(local.products[:, :C, :C], inverse)
        read = torch.bmm(local.products[:, :C, C:], local.v, out=room(*u.shape))
        added = torch.bmm(local.v.mT, exit_k, out=room(*S_part.shape))
        steps = part.walk(S_part, local.kept, read, entry_a, inverse, u, exit_b, added)
        _scan(S, steps)
        local.u.copy_(u)
        y_part = torch.bmm(entry_r, S_part.mT, out=read)
        y.add(part, y_part.baddbmm_(local.products[:, C:], local.uv))
    return y.all(), layout.unsorted(S), starts, us, inverses


def _scan(S: Tensor, steps: Iterable[tuple[Tensor, ...]]) -> None:
    """Take S [Q H, N, N] through steps of (before, kept, read, entry, inverse, u, exit, added).

    In place: each leaves S as it was in `before` and `inverse` (`read` + `entry` S^T) in u, and
    makes S diag(kept) + u^T `exit` + `added` of S.
    """
    for before, kept, read, entry, inverse, u, exit, added in steps:
        now = S[: len(before)]
        before.copy_(now)
        torch.bmm(inverse, read.baddbmm_(entry, now.mT), out=u)
        torch.addcmul(added, now, kept, out=now).baddbmm_(u.mT, exit)


def _invert(A: Tensor, out: Tensor) -> None:
    """(1 - A)^-1 of strictly lower triangular A [P, C, C]."""
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    torch.linalg.solve_triangular(one - A, one, upper=False, unitriangular=True, out=out)


class _Local:
    """What the chunks of a part are without their states.

    products, entry, exit, kept: of the readers a and r and the written b and k; the first of
        `entry` and `exit` is that of a and b, [P, C, N].
    uv: u, to be filled in, and v, [P, 2 C, N]; its halves are u and v.
    """

    def __init__(self, layout: ChunkLayout, part: Part, inputs: Sequence[Tensor], room: Room):
        r, w, k, v, a, b = inputs
        P, C, N = part.rows.stop - part.rows.start, layout.C, v.shape[-1]
        readers, written, self.uv = room(P, 2 * C, N), room(P, 2 * C, N), room(P, 2 * C, N)
        layout.chunks(a, part, readers[:, :C])
        layout.chunks(r, part, readers[:, C:])
        layout.chunks(b, part, written[:, :C], blank=True)
        layout.chunks(k, part, written[:, C:], blank=True)
        self.u, self.v = self.uv.split(C, 1)
        layout.chunks(v, part, self.v)
        rate = decay_rate(layout, part, w, room)
        self.decayed = decayed_products(readers, written, rate, room)
        self.products, self.kept = self.decayed.products, self.decayed.kept.unsqueeze(1)
        self.entry, self.exit = self.decayed.entry.split(C, 1), self.decayed.exit.split(C, 1)
