"""wkv7 in plain torch, a chunk of tokens at a time: no kernel needed, any device.

Let u_t = S_{t-1} a_t, what token t reads. In a chunk that starts from S and ends with S',

    u = (1 - A_ab)^-1 (A_ak v + a' S^T)
    y = A_rb u + A_rk v + r' S^T
    S' = S diag(kept) + u^T b" + v^T k"

where A are products between the chunk's tokens, a' and r' read from its start, b" and k" are what
is left at its end (rwkv/ops/decayed_products.py). What does not contain S is computed for many
chunks at once; the rest goes chunk after chunk, all sequences and heads together. For the backward
pass the inputs and the states at the chunks' starts are kept, everything else is computed again.
The work is in float32, or in float64 where the inputs are.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv.ops.chunk_layout import ChunkLayout, Part, chunk_layout
from rwkv.ops.decayed_products import LOG2_E, decayed_products

CHUNK = 32  # measured on two cores: 16 and 64 take 1.0 to 1.3 times as long
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
        S, C = layout.sorted(state), layout.C
        y, starts = layout.tokens(inputs[0]), layout.empty(S, S.shape[-1])
        for part in layout.parts:
            local = _Local(layout, part, inputs, S.dtype)
            y_part = torch.empty_like(local.uv[:, C:])
            for start, kept, entry, exit, inverse, read, uv, out in part.walk(
                starts[part.rows],
                local.kept,
                local.entry,
                local.exit,
                local.inverse,
                local.read_inside(),
                local.uv,
                y_part,
            ):
                now = S[: len(start)]
                start.copy_(now)
                from_start = torch.bmm(entry, start.mT)  # [n, 2 C, N]
                uv[:, :C] = torch.bmm(inverse, read.add_(from_start[:, :C]))
                out.copy_(from_start[:, C:])
                torch.mul(start, kept, out=now).baddbmm_(uv.mT, exit)
            y.add(part, y_part.baddbmm_(local.products[:, C:], local.uv))
        ctx.save_for_backward(*inputs, starts)
        ctx.layout = layout
        return y.all(), layout.unsorted(S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, starts = ctx.saved_tensors
        layout: ChunkLayout = ctx.layout
        dS, C = layout.sorted(d_state), layout.C
        grads = [layout.tokens(x) for x in inputs]
        for part in reversed(layout.parts):
            local = _Local(layout, part, inputs, dS.dtype)
            S, ends = starts[part.rows], torch.empty_like(starts[part.rows])
            read = local.read_inside().baddbmm_(local.entry[:, :C], S.mT)
            local.uv[:, :C] = torch.bmm(local.inverse, read)
            # The gradients of [u | v], and of what makes u and y: [A_ak v + a' S^T | y].
            d_made = torch.empty_like(local.uv)
            d_made[:, C:] = layout.chunks(dy, part, dS.dtype, blank=True)
            d_uv = torch.bmm(local.products[:, C:].mT, d_made[:, C:])
            for end, kept, entry, exit, inverse, made, uv in reversed(
                part.walk(ends, local.kept, local.entry, local.exit, local.inverse, d_made, d_uv)
            ):
                now = dS[: len(end)]
                end.copy_(now)
                uv.baddbmm_(exit, end.mT)
                made[:, :C] = torch.bmm(inverse.mT, uv[:, :C])
                torch.mul(end, kept, out=now).baddbmm_(made.mT, entry)
            values = local.backward(S, ends, d_uv, d_made)
            for grad, value in zip(grads, values, strict=True):
                grad.add(part, value)
        return None, layout.unsorted(dS), *(grad.all() for grad in grads)


class _Local:
    """What the chunks of a part are without their states.

    products, entry, exit, kept: of the readers a and r and the written b and k.
    inverse: (1 - A_ab)^-1, [P, C, C].
    uv: u, to be filled in, and v, [P, 2 C, N].
    """

    def __init__(
        self, layout: ChunkLayout, part: Part, inputs: Sequence[Tensor], dtype: torch.dtype
    ):
        r, w, k, v, a, b = (
            layout.chunks(x, part, dtype, blank=name in "kb")
            for name, x in zip("rwkvab", inputs, strict=True)
        )
        self.C = C = layout.C
        limits = torch.finfo(dtype)
        nothing = 1 - math.log(limits.tiny * limits.eps)  # the rate from where exp(-rate) is 0
        rate = w.mul_(LOG2_E).exp2_().clamp_(max=nothing)
        if layout.real is not None:
            rate *= layout.real[part.rows]
        self.decayed = decayed_products(a, r, [b, k], rate)
        self.products, self.kept = self.decayed.products, self.decayed.kept.unsqueeze(1)
        self.entry, self.exit = self.decayed.entry, self.decayed.exit
        one = torch.eye(C, dtype=dtype, device=v.device)
        self.inverse = torch.linalg.solve_triangular(
            one - self.products[:, :C, :C],
            one.expand(len(v), C, C),
            upper=False,
            unitriangular=True,
        )
        self.uv = v.new_empty(len(v), 2 * C, v.shape[-1])
        self.uv[:, C:] = v

    def read_inside(self) -> Tensor:
        """A_ak v, [P, C, N]."""
        return torch.bmm(self.products[:, : self.C, self.C :], self.uv[:, self.C :])

    def backward(self, S: Tensor, dS: Tensor, d_uv: Tensor, d_made: Tensor) -> list[Tensor]:
        """The gradients of r, w, k, v, a and b; S and dS are those at start and end."""
        C = self.C
        d_v = d_uv[:, C:].baddbmm(self.products[:, :C, C:].mT, d_made[:, :C])
        (d_a, d_r), (d_b, d_k), d_rate = self.decayed.backward(
            torch.bmm(d_made, self.uv.mT),
            torch.bmm(d_made, S),
            torch.bmm(self.uv, dS),
            (S * dS).sum(1),
        )
        return [d_r, d_rate.mul_(self.decayed.rate), d_k, d_v, d_a, d_b]
