"""norm_mix in Triton: one kernel forward, one backward; a program goes along consecutive tokens.

Forward reads x once and writes the mixes. Backward goes from a program's last token to its first,
for the gradient of a norm comes from its own token and from the one behind it; it reads x and the
gradients of the mixes and of the stream once and writes the gradient of x.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv.ops import cuda_build
from rwkv.ops.fused import flags, rows_a_program, sums_of_programs
from rwkv.ops.heads_triton import read, write
from rwkv.ops.packing import text_starts

# At most, of shared memory beside the rows that wait there: sums of the warps. Where none wait a
# program takes 32 KiB at most. tests/test_shared_memory.py has both from the compiler.
OTHER_BYTES = 256


def norm_shift_mix(
    x: Tensor,
    norm: nn.LayerNorm,
    shift: Tensor,
    mixes: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    deltas: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """As `norm_mix.norm_shift_mix`; `deltas`, [M, B, T, C], are added to the mixes."""
    rows = x.shape[0] * x.shape[1]
    starts = None if cu_seqlens is None else text_starts(cu_seqlens, rows, x.device)
    deltas = None if deltas is None else deltas.contiguous()
    shift = shift.to(x.dtype).contiguous()
    stream, last, *mixed = _NormShiftMix.apply(
        x.contiguous(), norm.weight, norm.bias, shift, starts, deltas, norm.eps, *mixes
    )
    return stream, tuple(mixed), last


def _launch(x: Tensor, rows: int) -> dict[str, int]:
    """Eight channels a thread, and the next token's loads under way while one is worked on.

    These wait in shared memory, where there is room for them.

    Args:
        x: [..., C].
        rows: of x's size that a token's loads bring, those that are made for every token.
    """
    C = x.shape[-1]
    block = triton.next_power_of_2(C)
    waiting = rows * block * x.element_size() + OTHER_BYTES
    ahead = cuda_build.too_small(x.device, waiting) is None
    return {
        "C": C,
        "BLOCK": block,
        "STAGES": 2 if ahead else 1,
        "num_warps": min(max(block // 256, 1), 32),
    }


class _NormShiftMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor,
        starts: Tensor | None,
        deltas: Tensor | None,
        eps: float,
        *mixes: Tensor,
    ) -> tuple[Tensor, ...]:
        B, T, C = x.shape
        rows = B * T
        mixed = tuple(torch.empty_like(x) for _ in mixes)
        last = torch.empty_like(shift)
        statistics = x.new_empty(rows, 2, dtype=torch.float32)
        count = rows_a_program(rows, x.device, programs=8, most=16)
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(rows, count),)](
                *(x, weight, bias, shift, starts, deltas, mixes, mixed, statistics, last),
                *(rows, T, count, eps),
                **_launch(x, 1),
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, shift, starts, deltas, statistics, *mixes)
        return x, last, *mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_stream: Tensor | None, grad_last: Tensor | None, *grads: Any):
        x, weight, bias, shift, starts, deltas, statistics, *mixes = ctx.saved_tensors
        B, T, C = x.shape
        rows = B * T
        need_x, need_weight, need_bias, need_shift, _, need_deltas, _, *need = ctx.needs_input_grad
        grads = tuple(torch.zeros_like(x) if g is None else g.contiguous() for g in grads)
        grad_stream = None if grad_stream is None else grad_stream.contiguous()
        grad_last = None if grad_last is None else grad_last.contiguous()
        grad_x = torch.empty_like(x) if need_x else None
        grad_shift = torch.empty_like(shift) if need_shift else None
        grad_deltas = torch.empty_like(deltas) if need_deltas else None
        parameters, wanted = [weight, bias, *mixes], [need_weight, need_bias, *need]
        sums = sum(wanted)
        count = rows_a_program(rows, x.device, programs=2, most=None if sums else 32)
        programs = triton.cdiv(rows, count)
        partial = x.new_empty(programs, sums, C, dtype=torch.float32)
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                *(x, weight, bias, shift, starts, deltas, tuple(mixes), statistics),
                *(grad_stream, grad_last, grads, grad_x, grad_shift, grad_deltas, partial),
                *(rows, T, count),
                WANTED=flags(wanted),
                SUMS=sums,
                **_launch(x, 4 + len(mixes) * (1 if deltas is None else 2)),
            )
        grad_weight, grad_bias, *grad_mixes = sums_of_programs(partial, parameters, wanted)
        return (
            *(grad_x, grad_weight, grad_bias, grad_shift, None, grad_deltas, None),
            *grad_mixes,
        )


@triton.jit
def _text_of_start(row, starts, T):
    """The sequence that starts with this row, or -1; their number for the row behind the last."""
    if starts is not None:
        return tl.load(starts + row)
    return tl.where(row % T == 0, row // T, -1)


@triton.jit
def _and_one(tiles, tile):
    return tiles + (tile,)


@triton.jit
def _mix(share, deltas, offsets, inside):
    """How much of the token before goes into a mix."""
    mix = share
    if deltas is not None:
        mix = share + read(deltas, offsets, inside)
    return mix


@triton.jit
def _unit(x, statistics, row, c, inside, C: tl.constexpr):
    """A row less its mean, times rstd; and rstd."""
    at = row.to(tl.int64)
    rstd = tl.load(statistics + 2 * at + 1)
    return (read(x, at * C + c, inside) - tl.load(statistics + 2 * at)) * rstd, rstd


@triton.jit(do_not_specialize=["rows", "T", "count"])
def _forward_kernel(
    x,
    weight,
    bias,
    shift,
    starts,
    deltas,
    mixes,
    mixed,
    statistics,
    last,
    rows,
    T,
    count,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    M: tl.constexpr = len(mixes)
    first = tl.program_id(0) * count
    stop = tl.minimum(first + count, rows)
    c = tl.arange(0, BLOCK)
    inside = c < C
    scale = read(weight, c, inside)
    offset = read(bias, c, inside)
    share = ()
    for i in tl.static_range(M):
        share = _and_one(share, read(mixes[i], c, inside))
    before = tl.zeros([BLOCK], tl.float32)
    all_rows = rows.to(tl.int64) * C
    # The row before the program's first is normed once more and not written.
    begin = tl.maximum(first - 1, 0)
    for step in tl.range(0, stop - begin, num_stages=STAGES):
        row = begin + step
        here = row.to(tl.int64) * C
        value = read(x, here + c, inside)
        mean = tl.sum(value, axis=0) / C
        centered = tl.where(inside, value - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / C + eps)
        normed = centered * rstd * scale + offset
        if row >= first:
            q = _text_of_start(row, starts, T)
            handed = read(shift, tl.maximum(q, 0).to(tl.int64) * C + c, inside & (q >= 0))
            difference = tl.where(q >= 0, handed, before) - normed
            for i in tl.static_range(M):
                mix = _mix(share[i], deltas, i * all_rows + here + c, inside)
                write(mixed[i], here + c, normed + difference * mix, inside)
            tl.store(statistics + 2 * row.to(tl.int64), mean)
            tl.store(statistics + 2 * row.to(tl.int64) + 1, rstd)
            after = _text_of_start(row + 1, starts, T)
            write(
                last, tl.maximum(after - 1, 0).to(tl.int64) * C + c, normed, inside & (after >= 0)
            )
        before = normed


@triton.jit(do_not_specialize=["rows", "T", "count"])
def _backward_kernel(
    x,
    weight,
    bias,
    shift,
    starts,
    deltas,
    mixes,
    statistics,
    grad_stream,
    grad_last,
    grads,
    grad_x,
    grad_shift,
    grad_deltas,
    partial,
    rows,
    T,
    count,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    WANTED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """WANTED has a bit for each of weight, bias and the mixes; `partial` holds those, in order."""
    M: tl.constexpr = len(mixes)
    first = tl.program_id(0) * count
    stop = tl.minimum(first + count, rows)
    c = tl.arange(0, BLOCK)
    inside = c < C
    scale = read(weight, c, inside)
    offset = read(bias, c, inside)
    zeros = tl.zeros([BLOCK], tl.float32)
    all_rows = rows.to(tl.int64) * C
    share = ()
    for i in tl.static_range(M):
        share = _and_one(share, read(mixes[i], c, inside))

    # What the row behind the program's last sends back to it.
    behind = stop.to(tl.int64) * C
    continues = (stop < rows) & (_text_of_start(stop, starts, T) < 0)
    sent_back = zeros
    for i in tl.static_range(M):
        mix = _mix(share[i], deltas, i * all_rows + behind + c, inside & continues)
        sent_back += mix * read(grads[i], behind + c, inside & continues)

    unit, rstd = _unit(x, statistics, stop - 1, c, inside, C)
    sum_scale = zeros
    sum_offset = zeros
    sum_share = (zeros,) * M
    for back in tl.range(0, stop - first, num_stages=STAGES):
        row = stop - 1 - back
        here = row.to(tl.int64) * C
        q = _text_of_start(row, starts, T)
        is_first = q >= 0
        unit_before, rstd_before = _unit(x, statistics, tl.maximum(row - 1, 0), c, inside, C)
        handed = read(shift, tl.maximum(q, 0).to(tl.int64) * C + c, inside & is_first)
        before = tl.where(is_first, handed, unit_before * scale + offset)
        difference = before - (unit * scale + offset)

        direct = sent_back
        sent = zeros
        sums = ()
        for i in tl.static_range(M):
            gradient = read(grads[i], here + c, inside)
            direct += gradient
            sent += gradient * _mix(share[i], deltas, i * all_rows + here + c, inside)
            write(grad_deltas, i * all_rows + here + c, gradient * difference, inside)
            if (WANTED >> (i + 2)) & 1:
                sums = _and_one(sums, sum_share[i] + gradient * difference)
            else:
                sums = _and_one(sums, sum_share[i])
        sum_share = sums
        grad_normed = direct - sent
        if grad_last is not None:
            after = _text_of_start(row + 1, starts, T)
            handed_on = tl.maximum(after - 1, 0).to(tl.int64) * C + c
            grad_normed += read(grad_last, handed_on, inside & (after >= 0))
        write(grad_shift, tl.maximum(q, 0).to(tl.int64) * C + c, sent, inside & is_first)
        if WANTED & 1:
            sum_scale += grad_normed * unit
        if WANTED & 2:
            sum_offset += grad_normed
        if grad_x is not None:
            grad_unit = grad_normed * scale
            mean = tl.sum(grad_unit, axis=0) / C
            along = tl.sum(grad_unit * unit, axis=0) / C
            result = rstd * (grad_unit - mean - unit * along)
            if grad_stream is not None:
                result += read(grad_stream, here + c, inside)
            write(grad_x, here + c, result, inside)
        sent_back = tl.where(is_first, 0.0, sent)
        unit = unit_before
        rstd = rstd_before

    target = partial + tl.program_id(0).to(tl.int64) * SUMS * C + c
    if WANTED & 1:
        tl.store(target, sum_scale, mask=inside)
        target += C
    if WANTED & 2:
        tl.store(target, sum_offset, mask=inside)
        target += C
    for i in tl.static_range(M):
        if (WANTED >> (i + 2)) & 1:
            tl.store(target, sum_share[i], mask=inside)
            target += C
