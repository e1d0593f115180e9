"""RWKV-6's mixes that follow the data, in Triton: one kernel forward, one backward.

    x_t^(i) = n_t + (n_(t-1) - n_t) (mix_i + low_t^(i) high_i)

A program has a tile of tokens and channels, of which it makes the normed tokens again from x and
the products of low rank in its registers, so that neither is ever in memory. Backward writes the
gradients of those products, which two products with the factors read, and those of n_t and n_(t-1),
from which `norm_mix_triton` makes the gradient of x.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv.ops.fused import sums_of_programs
from rwkv.ops.heads_triton import read, write
from rwkv.ops.norm_mix_triton import Unmade, text_of_start
from rwkv.ops.triton_chunks import INTERPRETED, product

# Tile by bytes of a number: the fastest on an H100 of those that leave no register to memory there,
# or nearly none in float32.
LAUNCH = {
    2: {"ROWS": 64, "COLUMNS": 32, "num_warps": 4},
    4: {"ROWS": 32, "COLUMNS": 32, "num_warps": 4},
}


def mixes_by_data(
    x: Tensor,
    norm: nn.LayerNorm,
    shift: Tensor,
    low: Tensor,
    high: Tensor,
    mixes: Sequence[Tensor],
    unmade: Unmade,
) -> tuple[Tensor, ...]:
    """The mixes, one [B, T, C] for each of `mixes`.

    Args:
        x: the stream, [B, T, C].
        norm, shift: as `norm_mix_triton.norm_shift_mix` had them, which gave `unmade`.
        low: [B, T, M * rank].
        high: [M, rank, C].
        mixes: what the products are added to, M of [C].
    """
    mixed: tuple[Tensor, ...] = _MixesByData.apply(
        *(x.detach().contiguous(), unmade.normed, unmade.before, unmade.statistics, unmade.starts),
        *(norm.weight.detach(), norm.bias.detach(), shift.detach().to(x.dtype).contiguous()),
        *(low.contiguous(), high.contiguous(), *mixes),
    )
    return mixed


class _MixesByData(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        normed: Tensor,
        before: Tensor,
        statistics: Tensor,
        starts: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor,
        low: Tensor,
        high: Tensor,
        *mixes: Tensor,
    ) -> tuple[Tensor, ...]:
        B, T, C = x.shape
        rows = B * T
        mixed = tuple(torch.empty_like(x) for _ in mixes)
        launch = _launch(x, high)
        programs = triton.cdiv(rows, launch["ROWS"]) * triton.cdiv(C, launch["COLUMNS"])
        with torch.cuda.device_of(x):
            _mixes_kernel[(programs,)](
                *(x, statistics, weight, bias, shift, starts, low, high, mixes, mixed, rows, T),
                **launch,
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, statistics, starts, weight, bias, shift, low, high, *mixes)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, statistics, starts, weight, bias, shift, low, high, *mixes = ctx.saved_tensors
        B, T, C = x.shape
        M, R = high.shape[:2]
        rows = B * T
        _, need_normed, need_before, *_, need_low, need_high = ctx.needs_input_grad[:10]
        wanted = list(ctx.needs_input_grad[10:])
        grads = tuple(torch.zeros_like(x) if g is None else g.contiguous() for g in grads)
        grad_normed = torch.empty_like(x) if need_normed else None
        grad_before = torch.empty_like(x) if need_before else None
        grad_deltas = x.new_empty(M, rows, C) if need_low or need_high else None
        launch = _launch(x, high)
        tiles = triton.cdiv(rows, launch["ROWS"])
        partial = x.new_empty(tiles, M, C, dtype=torch.float32) if any(wanted) else None
        with torch.cuda.device_of(x):
            _mixes_gradient_kernel[(tiles * triton.cdiv(C, launch["COLUMNS"]),)](
                *(x, statistics, weight, bias, shift, starts, low, high, tuple(mixes), grads),
                *(grad_normed, grad_before, grad_deltas, partial, rows, T),
                **launch,
            )
        grad_mixes: list[Tensor | None] = [None] * M
        if partial is not None:
            grad_mixes = sums_of_programs(partial, mixes, [True] * M)
        grad_low = grad_high = None
        if need_low and grad_deltas is not None:
            grad_low = torch.empty_like(low)
            by_mix = grad_low.view(rows, M, R).transpose(0, 1)
            by_mix.copy_(torch.bmm(grad_deltas, high.transpose(1, 2)))
        if need_high and grad_deltas is not None:
            grad_high = torch.bmm(low.view(rows, M, R).permute(1, 2, 0), grad_deltas)
        return (
            *(None, grad_normed, grad_before, None, None, None, None, None),
            *(grad_low, grad_high, *grad_mixes),
        )


def _launch(x: Tensor, high: Tensor) -> dict[str, int]:
    rank = high.shape[1]
    return {
        "C": x.shape[-1],
        "RANK": rank,
        "R": max(triton.next_power_of_2(rank), 16),
        **LAUNCH[x.element_size()],
    }


@triton.jit
def _normed(x, statistics, t, n, mask, scale, offset, C: tl.constexpr):
    """Normed tokens t of channels n."""
    mean = tl.load(statistics + 2 * t)
    rstd = tl.load(statistics + 2 * t + 1)
    value = read(x, t[:, None] * C + n[None, :], mask)
    return (value - mean[:, None]) * rstd[:, None] * scale[None, :] + offset[None, :]


@triton.jit
def _tile(
    x,
    statistics,
    weight,
    bias,
    shift,
    starts,
    rows,
    T,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """This program's tokens t and channels n, and which exist; the tile of tokens by its number.

    Normed they are, and what the token before has more.
    """
    across: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    tile = (tl.program_id(0) // across).to(tl.int64)
    n = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    t = tile * ROWS + tl.arange(0, ROWS)
    scale = read(weight, n, n < C)
    offset = read(bias, n, n < C)
    mask = (t < rows)[:, None] & (n < C)[None, :]
    here = tl.minimum(t, rows - 1)
    q = text_of_start(here, starts, T)
    is_first = (q >= 0)[:, None]
    normed = _normed(x, statistics, here, n, mask, scale, offset, C)
    earlier = tl.maximum(here - 1, 0)
    before = _normed(x, statistics, earlier, n, mask & (q < 0)[:, None], scale, offset, C)
    at_shift = tl.maximum(q, 0).to(tl.int64)[:, None] * C + n[None, :]
    handed = read(shift, at_shift, mask & is_first)
    return tile, t, n, mask, normed, tl.where(is_first, handed, before) - normed


@triton.jit
def _left(low, t, rows, i, M: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr):
    """The low-rank side of mix i for tokens t, [ROWS, R]."""
    r = tl.arange(0, R)
    mask = (t < rows)[:, None] & (r < RANK)[None, :]
    left = tl.load(low + t[:, None] * (M * RANK) + i * RANK + r[None, :], mask=mask, other=0.0)
    if INTERPRETED:  # which multiplies bfloat16 as integers
        left = left.to(tl.float32)
    return left


@triton.jit
def _right(high, n, i, C: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr):
    """The wide side of mix i for channels n, [R, COLUMNS]."""
    r = tl.arange(0, R)
    mask = (r < RANK)[:, None] & (n < C)[None, :]
    right = tl.load(high + (i * RANK + r)[:, None] * C + n[None, :], mask=mask, other=0.0)
    if INTERPRETED:
        right = right.to(tl.float32)
    return right


@triton.jit(do_not_specialize=["rows", "T"])
def _mixes_kernel(
    x,
    statistics,
    weight,
    bias,
    shift,
    starts,
    low,
    high,
    mixes,
    mixed,
    rows,
    T,
    C: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    M: tl.constexpr = len(mixes)
    _, t, n, mask, normed, difference = _tile(
        x, statistics, weight, bias, shift, starts, rows, T, C, ROWS, COLUMNS
    )
    at = t[:, None] * C + n[None, :]
    for i in tl.static_range(M):
        delta = product(_left(low, t, rows, i, M, RANK, R), _right(high, n, i, C, RANK, R))
        share = read(mixes[i], n, n < C)
        write(mixed[i], at, normed + difference * (share[None, :] + delta), mask)


@triton.jit(do_not_specialize=["rows", "T"])
def _mixes_gradient_kernel(
    x,
    statistics,
    weight,
    bias,
    shift,
    starts,
    low,
    high,
    mixes,
    grads,
    grad_normed,
    grad_before,
    grad_deltas,
    partial,
    rows,
    T,
    C: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial: the sums over each tile's tokens, [tiles, M, C], for the gradients of the mixes."""
    M: tl.constexpr = len(mixes)
    tile, t, n, mask, normed, difference = _tile(
        x, statistics, weight, bias, shift, starts, rows, T, C, ROWS, COLUMNS
    )
    at = t[:, None] * C + n[None, :]
    kept = tl.zeros([ROWS, COLUMNS], tl.float32)
    sent = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.static_range(M):
        gradient = read(grads[i], at, mask)
        moved = gradient * difference
        write(grad_deltas, i * rows.to(tl.int64) * C + at, moved, mask)
        if partial is not None:
            target = partial + (tile * M + i) * C + n
            tl.store(target, tl.sum(moved, axis=0), mask=n < C)
        delta = product(_left(low, t, rows, i, M, RANK, R), _right(high, n, i, C, RANK, R))
        share = read(mixes[i], n, n < C)
        to_before = gradient * (share[None, :] + delta)
        kept += gradient - to_before
        sent += to_before
    write(grad_normed, at, kept, mask)
    write(grad_before, at, sent, mask)
