"""wkv6 in plain torch, a chunk of tokens at a time: no kernel needed, any device.

In a chunk that starts from S and ends with S',

    y = (A + diag(r_t . u * k_t)) v + r' S^T
    S' = S diag(kept) + v^T k"

where A are the products between the chunk's tokens, r' reads from its start and k" is what is left
at its end (rwkv/ops/decayed_products.py, right for any w). All products are computed for many
chunks at once; from chunk to chunk goes only S' = S diag(kept) + (v^T k"), all sequences and heads
together. For the backward pass the inputs and the states at the chunks' starts are kept,
everything else is computed again. The work is in float32, or in float64 where the inputs are.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv.keeper import keeping
from rwkv.ops.chunk_layout import ChunkLayout, Part, Room, chunk_layout, room_like
from rwkv.ops.decayed_products import decay_rate, decayed_products

CHUNK = 32
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
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _WKV6.apply(chunk_layout(v, cu_seqlens, CHUNK), state, u, r, w, k, v)


class _WKV6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: ChunkLayout, state: Tensor, u: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, final, starts = _forward(layout, state, u, *inputs)
        ctx.save_for_backward(u, *inputs, starts)
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        u, *inputs, starts = ctx.saved_tensors
        layout: ChunkLayout = ctx.layout
        dy = torch.zeros_like(inputs[0]) if dy is None else dy
        dS = layout.sorted_gradient(d_state, starts)
        room, du = room_like(dS), dS.new_zeros(layout.H, dS.shape[-1])
        grads = [layout.tokens(x) for x in inputs]
        for part in reversed(layout.parts):
            room.clear()
            local = _Local(layout, part, u, inputs, room)
            S, v = starts[part.rows], local.v
            dy_part = layout.chunks(dy, part, room(*v.shape), blank=True)
            dS_part = room(*S.shape)
            added = torch.bmm(dy_part.mT, local.entry, out=room(*S.shape))
            _scan(dS, reversed(part.walk(dS_part, local.kept, added)))
            d_v = torch.bmm(local.products.mT, dy_part, out=room(*v.shape))
            d_v.baddbmm_(local.exit, dS_part.mT)
            d_products = torch.bmm(dy_part, v.mT, out=room(*local.products.shape))
            own = d_products.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()  # [P, C, 1]
            (d_r,), (d_k,), d_rate = local.decayed.backward(
                d_products,
                torch.bmm(dy_part, S, out=room(*v.shape)),
                torch.bmm(v, dS_part, out=room(*v.shape)),
                torch.mul(S, dS_part, out=added).sum(1),
            )
            du += local.own_backward(own, d_r, d_k)
            d_w = d_rate.mul_(local.decayed.rate)
            for grad, value in zip(grads, (d_r, d_w, d_k, d_v), strict=True):
                grad.add(part, value)
        d_initial = layout.unsorted(dS) if ctx.needs_input_grad[1] else None
        return None, d_initial, du.to(u.dtype), *(grad.all() for grad in grads)


@keeping
def _forward(layout: ChunkLayout, state: Tensor, u: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """y, S_T and what the backward pass wants: the states at the starts."""
    S, room = layout.sorted(state), room_like(state)
    y, starts = layout.tokens(inputs[0]), layout.empty(S, *S.shape[1:])
    for part in layout.parts:
        room.clear()
        local = _Local(layout, part, u, inputs, room)
        S_part = starts[part.rows]
        added = torch.bmm(local.v.mT, local.exit, out=room(*S_part.shape))
        _scan(S, part.walk(S_part, local.kept, added))
        y_part = torch.bmm(local.products, local.v, out=room(*local.v.shape))
        y.add(part, y_part.baddbmm_(local.entry, S_part.mT))
    return y.all(), layout.unsorted(S), starts


def _scan(S: Tensor, steps: Iterable[tuple[Tensor, ...]]) -> None:
    """Take S [Q H, N, N] through steps of (before, kept, added), in place.

    Each leaves S as it was in `before` and makes S diag(kept) + `added` of it.
    """
    for before, kept, added in steps:
        now = S[: len(before)]
        before.copy_(now)
        torch.addcmul(added, before, kept, out=now)


class _Local:
    """What the chunks of a part are without their states.

    products, entry, exit, kept: of the reader r and the written k; products with the bonus.
    v: [P, C, N].
    """

    def __init__(
        self,
        layout: ChunkLayout,
        part: Part,
        u: Tensor,
        inputs: tuple[Tensor, ...],
        room: Room,
    ):
        r, w, k, v = inputs
        shape = P, _, N = part.rows.stop - part.rows.start, layout.C, v.shape[-1]
        self._r = layout.chunks(r, part, room(*shape))
        self._k = layout.chunks(k, part, room(*shape), blank=True)
        self.v = layout.chunks(v, part, room(*shape))
        rate = decay_rate(layout, part, w, room)
        self.decayed = decayed_products(
            room(*shape).copy_(self._r), room(*shape).copy_(self._k), rate, room
        )
        self.products, self.kept = self.decayed.products, self.decayed.kept.unsqueeze(1)
        self.entry, self.exit = self.decayed.entry, self.decayed.exit
        self._H, self._u = layout.H, room(P, 1, N)
        self._u.unflatten(0, (-1, layout.H)).copy_(u.unsqueeze(1))
        self._bonus_r = torch.mul(self._r, self._u, out=room(*shape))
        bonus = torch.linalg.vecdot(self._bonus_r, self._k)
        self.products.diagonal(dim1=1, dim2=2).copy_(bonus)

    def own_backward(self, own: Tensor, d_r: Tensor, d_k: Tensor) -> Tensor:
        """The gradient of u [H, N] from that of each token's product with itself, [P, C, 1]; those
        of r and k are added to d_r and d_k."""
        d_k.addcmul_(own, self._bonus_r)
        own_k = self._k.mul_(own)
        d_r.addcmul_(own_k, self._u)
        return torch.linalg.vecdot(own_k, self._r, dim=1).unflatten(0, (-1, self._H)).sum(0)
