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

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv.ops.chunk_layout import ChunkLayout, Part, chunk_layout
from rwkv.ops.decayed_products import LOG2_E, decayed_products

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
        S = layout.sorted(state)
        y, starts = layout.tokens(inputs[0]), layout.empty(S, S.shape[-1])
        for part in layout.parts:
            local = _Local(layout, part, u, inputs, S.dtype)
            added = torch.bmm(local.v.mT, local.exit)
            for start, kept, new in part.walk(starts[part.rows], local.kept, added):
                now = S[: len(start)]
                start.copy_(now)
                torch.addcmul(new, start, kept, out=now)
            inside = torch.bmm(local.products, local.v)
            y.add(part, inside.baddbmm_(local.entry, starts[part.rows].mT))
        ctx.save_for_backward(u, *inputs, starts)
        ctx.layout = layout
        return y.all(), layout.unsorted(S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        u, *inputs, starts = ctx.saved_tensors
        layout: ChunkLayout = ctx.layout
        dS = layout.sorted(d_state)
        du = dS.new_zeros(layout.H, dS.shape[-1])
        grads = [layout.tokens(x) for x in inputs]
        for part in reversed(layout.parts):
            local = _Local(layout, part, u, inputs, dS.dtype)
            dy_part = layout.chunks(dy, part, dS.dtype, blank=True)
            ends = torch.empty_like(starts[part.rows])
            added = torch.bmm(dy_part.mT, local.entry)
            for end, kept, new in reversed(part.walk(ends, local.kept, added)):
                now = dS[: len(end)]
                end.copy_(now)
                torch.addcmul(new, end, kept, out=now)
            values, du_part = local.backward(starts[part.rows], ends, dy_part)
            du += du_part
            for grad, value in zip(grads, values, strict=True):
                grad.add(part, value)
        return None, layout.unsorted(dS), du.to(u.dtype), *(grad.all() for grad in grads)


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
        dtype: torch.dtype,
    ):
        self.r, w, self.k, self.v = (
            layout.chunks(x, part, dtype, blank=name == "k")
            for name, x in zip("rwkv", inputs, strict=True)
        )
        limits = torch.finfo(dtype)
        nothing = 1 - math.log(limits.tiny * limits.eps)  # the rate from where exp(-rate) is 0
        rate = w.mul_(LOG2_E).exp2_().clamp_(max=nothing)
        if layout.real is not None:
            rate *= layout.real[part.rows]
        self.decayed = decayed_products(self.r, None, [self.k], rate)
        self.products, self.kept = self.decayed.products, self.decayed.kept.unsqueeze(1)
        self.entry, self.exit = self.decayed.entry, self.decayed.exit
        self.u = u.to(dtype).unsqueeze(1).repeat(len(self.v) // layout.H, 1, 1)  # [P, 1, N]
        self.H = layout.H
        self.bonus_r = self.r * self.u
        self.products.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(self.bonus_r, self.k))

    def backward(self, S: Tensor, dS: Tensor, dy: Tensor) -> tuple[list[Tensor], Tensor]:
        """The gradients of r, w, k, v and u; S and dS are those at start and end."""
        d_products = torch.bmm(dy, self.v.mT)
        own = d_products.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()  # [P, C, 1]
        d_v = torch.bmm(self.products.mT, dy).baddbmm_(self.exit, dS.mT)
        (d_r,), (d_k,), d_rate = self.decayed.backward(
            d_products, torch.bmm(dy, S), torch.bmm(self.v, dS), torch.linalg.vecdot(S, dS, dim=1)
        )
        own_k = own * self.k
        d_u = torch.linalg.vecdot(own_k, self.r, dim=1).unflatten(0, (-1, self.H)).sum(0)
        d_r.addcmul_(own_k, self.u)
        d_k.addcmul_(own, self.bonus_r)
        return [d_r, d_rate.mul_(self.decayed.rate), d_k, d_v], d_u
