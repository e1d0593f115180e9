"""norm_mix in Triton: one kernel forward, one backward; a program goes along consecutive tokens.

Forward reads x once and writes the mixes. Backward goes from a program's last token to its first,
for the gradient of a norm comes from its own token and from the one behind it; it reads x and the
gradients of the mixes and of the stream once and writes the gradient of x.

A token's channels are held in parts: as many as the largest power of two takes, and those behind
it, so that 2,560 channels are 2,048 and 512 and not 4,096.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Unmade(NamedTuple):
    """The normed tokens, and those before them, for a kernel that makes them again from x.

    Attributes:
        normed, before: [B, T, C], without values: what gradients flow back through.
        statistics: mean and 1 / deviation of each token, [B T, 2], float32.
        starts: as `text_starts` gives it; None unless packed.
    """

    normed: Tensor
    before: Tensor
    statistics: Tensor
    starts: Tensor | None


def norm_shift_mix(
    x: Tensor,
    norm: nn.LayerNorm,
    shift: Tensor,
    mixes: Sequence[Tensor],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Unmade]:
    """As `norm_mix.norm_shift_mix`, and what stands for the normed tokens."""
    rows = x.shape[0] * x.shape[1]
    starts = None if cu_seqlens is None else text_starts(cu_seqlens, rows, x.device)
    shift = shift.to(x.dtype).contiguous()
    stream, last, normed, before, statistics, *mixed = _NormShiftMix.apply(
        x.contiguous(), norm.weight, norm.bias, shift, starts, norm.eps, *mixes
    )
    return stream, tuple(mixed), last, Unmade(normed, before, statistics, starts)


def parts(C: int) -> tuple[int, int]:
    """The powers of two that hold C channels: the largest one, and one for the rest or 0."""
    block = 1 << (C.bit_length() - 1)
    return block, triton.next_power_of_2(C - block) if block < C else 0


def _launch(x: Tensor, M: int, rows: int) -> dict[str, int]:
    """Channels of a thread, by what registers hold; and whether the next token's loads wait.

    They do so in shared memory while a token is worked on, where there is room for them.

    Args:
        x: [..., C].
        M: the number of mixes.
        rows: of x's size that a token's loads bring, those that are made for every token.
    """
    C = x.shape[-1]
    block, rest = parts(C)
    waiting = rows * (block + rest) * x.element_size() + OTHER_BYTES
    ahead = cuda_build.too_small(x.device, waiting) is None
    warps = max((block + rest) // (512 if M <= 2 else 256), 1)
    return {
        "C": C,
        "BLOCK": block,
        "REST": rest,
        "STAGES": 2 if ahead else 1,
        "num_warps": min(1 << (warps.bit_length() - 1), 32),
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
                *(x, weight, bias, shift, starts, mixes, mixed, statistics, last),
                *(rows, T, count, eps),
                **_launch(x, len(mixes), 1),
            )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(x, weight, bias, shift, starts, statistics, *mixes)
        unmade = (x.new_empty(1).expand_as(x) for _ in range(2))
        return x, last, *unmade, statistics, *mixed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_stream: Tensor | None,
        grad_last: Tensor | None,
        grad_normed: Tensor | None,
        grad_before: Tensor | None,
        _: None,
        *grads: Any,
    ):
        x, weight, bias, shift, starts, statistics, *mixes = ctx.saved_tensors
        B, T, C = x.shape
        rows = B * T
        need_x, need_weight, need_bias, need_shift, _, _, *need = ctx.needs_input_grad
        grads = tuple(torch.zeros_like(x) if g is None else g.contiguous() for g in grads)
        given = tuple(
            None if g is None else g.contiguous()
            for g in (grad_stream, grad_last, grad_normed, grad_before)
        )
        grad_x = torch.empty_like(x) if need_x else None
        grad_shift = torch.zeros_like(shift) if need_shift else None  # empty texts keep these
        parameters, wanted = [weight, bias, *mixes], [need_weight, need_bias, *need]
        sums = sum(wanted)
        count = rows_a_program(rows, x.device, programs=2, most=None if sums else 32)
        programs = triton.cdiv(rows, count)
        partial = x.new_empty(programs, sums, C, dtype=torch.float32)
        brought = 2 + len(mixes) + sum(g is not None for g in given)
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                *(x, weight, bias, shift, starts, tuple(mixes), statistics),
                *(*given, grads, grad_x, grad_shift, partial),
                *(rows, T, count),
                WANTED=flags(wanted),
                SUMS=sums,
                **_launch(x, len(mixes), brought),
            )
        grad_weight, grad_bias, *grad_mixes = sums_of_programs(partial, parameters, wanted)
        return grad_x, grad_weight, grad_bias, grad_shift, None, None, *grad_mixes


@triton.jit
def text_of_start(row, starts, T):
    """The sequence that starts with a row, or -1; their number for the row behind the last."""
    if starts is not None:
        return tl.load(starts + row)
    return tl.where(row % T == 0, row // T, -1).to(tl.int32)


@triton.jit
def _and_one(tiles, tile):
    return tiles + (tile,)


@triton.jit
def _channels(C: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """The channels of each part, and which of them exist."""
    c = (tl.arange(0, BLOCK),)
    if REST > 0:
        c = _and_one(c, BLOCK + tl.arange(0, REST))
    inside = ()
    for p in tl.static_range(len(c)):
        inside = _and_one(inside, c[p] < C)
    return c, inside


@triton.jit
def _read_parts(pointer, at, c, inside, wanted):
    """A row from `at` on, in parts; zeros unless it is wanted."""
    found = ()
    for p in tl.static_range(len(c)):
        found = _and_one(found, read(pointer, at + c[p], inside[p] & wanted))
    return found


@triton.jit
def _read_shares(mixes, c, inside):
    """All parts of the first mix, then those of the next one."""
    shares = ()
    for i in tl.static_range(len(mixes)):
        for p in tl.static_range(len(c)):
            shares = _and_one(shares, read(mixes[i], c[p], inside[p]))
    return shares


@triton.jit
def _zeros(c):
    found = ()
    for p in tl.static_range(len(c)):
        found = _and_one(found, tl.zeros_like(c[p]).to(tl.float32))
    return found


@triton.jit
def _total(row):
    """The sum over all parts of a row."""
    total = tl.sum(row[0], axis=0)
    if len(row) > 1:
        total += tl.sum(row[1], axis=0)
    return total


@triton.jit
def _unit(x, statistics, row, c, inside, C: tl.constexpr):
    """A row less its mean, times rstd; and rstd."""
    at = row.to(tl.int64)
    mean = tl.load(statistics + 2 * at)
    rstd = tl.load(statistics + 2 * at + 1)
    unit = ()
    for p in tl.static_range(len(c)):
        unit = _and_one(unit, (read(x, at * C + c[p], inside[p]) - mean) * rstd)
    return unit, rstd


@triton.jit(do_not_specialize=["rows", "T", "count"])
def _forward_kernel(
    x,
    weight,
    bias,
    shift,
    starts,
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
    REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    M: tl.constexpr = len(mixes)
    first = tl.program_id(0) * count
    stop = tl.minimum(first + count, rows)
    c, inside = _channels(C, BLOCK, REST)
    P: tl.constexpr = len(c)
    scale = _read_parts(weight, 0, c, inside, True)
    offset = _read_parts(bias, 0, c, inside, True)
    share = _read_shares(mixes, c, inside)
    before = _zeros(c)
    # The row before the program's first is normed once more and not written.
    begin = tl.maximum(first - 1, 0)
    for step in tl.range(0, stop - begin, num_stages=STAGES):
        row = begin + step
        here = row.to(tl.int64) * C
        value = _read_parts(x, here, c, inside, True)
        mean = _total(value) / C
        centered = ()
        squares = ()
        for p in tl.static_range(P):
            centered = _and_one(centered, tl.where(inside[p], value[p] - mean, 0.0))
            squares = _and_one(squares, centered[p] * centered[p])
        rstd = 1.0 / tl.sqrt(_total(squares) / C + eps)
        normed = ()
        for p in tl.static_range(P):
            normed = _and_one(normed, centered[p] * rstd * scale[p] + offset[p])
        if row >= first:
            q = text_of_start(row, starts, T)
            after = text_of_start(row + 1, starts, T)
            handed = _read_parts(shift, tl.maximum(q, 0).to(tl.int64) * C, c, inside, q >= 0)
            handed_on = tl.maximum(after - 1, 0).to(tl.int64) * C
            for p in tl.static_range(P):
                difference = tl.where(q >= 0, handed[p], before[p]) - normed[p]
                for i in tl.static_range(M):
                    mix = normed[p] + difference * share[i * P + p]
                    write(mixed[i], here + c[p], mix, inside[p])
                write(last, handed_on + c[p], normed[p], inside[p] & (after >= 0))
            tl.store(statistics + 2 * row.to(tl.int64), mean)
            tl.store(statistics + 2 * row.to(tl.int64) + 1, rstd)
        before = normed


@triton.jit(do_not_specialize=["rows", "T", "count"])
def _backward_kernel(
    x,
    weight,
    bias,
    shift,
    starts,
    mixes,
    statistics,
    grad_stream,
    grad_last,
    grad_normed,
    grad_before,
    grads,
    grad_x,
    grad_shift,
    partial,
    rows,
    T,
    count,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    STAGES: tl.constexpr,
    WANTED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """WANTED has a bit for each of weight, bias and the mixes; `partial` holds those, in order."""
    M: tl.constexpr = len(mixes)
    first = tl.program_id(0) * count
    stop = tl.minimum(first + count, rows)
    c, inside = _channels(C, BLOCK, REST)
    P: tl.constexpr = len(c)
    scale = _read_parts(weight, 0, c, inside, True)
    offset = _read_parts(bias, 0, c, inside, True)
    share = _read_shares(mixes, c, inside)

    # What the row behind the program's last sends back to it.
    behind = stop.to(tl.int64) * C
    continues = (stop < rows) & (text_of_start(stop, starts, T) < 0)
    sent_back = _read_parts(grad_before, behind, c, inside, continues)
    for i in tl.static_range(M):
        gradient = _read_parts(grads[i], behind, c, inside, continues)
        sums = ()
        for p in tl.static_range(P):
            sums = _and_one(sums, sent_back[p] + share[i * P + p] * gradient[p])
        sent_back = sums

    unit, rstd = _unit(x, statistics, stop - 1, c, inside, C)
    sum_scale = _zeros(c)
    sum_offset = _zeros(c)
    sum_share = ()
    for _ in tl.static_range(M):
        for p in tl.static_range(P):
            sum_share = _and_one(sum_share, tl.zeros_like(scale[p]))
    for back in tl.range(0, stop - first, num_stages=STAGES):
        row = stop - 1 - back
        here = row.to(tl.int64) * C
        q = text_of_start(row, starts, T)
        after = text_of_start(row + 1, starts, T)
        is_first = q >= 0
        unit_before, rstd_before = _unit(x, statistics, tl.maximum(row - 1, 0), c, inside, C)
        at_shift = tl.maximum(q, 0).to(tl.int64) * C
        handed = _read_parts(shift, at_shift, c, inside, is_first)

        direct = sent_back
        sent = ()
        difference = ()
        for p in tl.static_range(P):
            before = tl.where(is_first, handed[p], unit_before[p] * scale[p] + offset[p])
            difference = _and_one(difference, before - (unit[p] * scale[p] + offset[p]))
            sent = _and_one(sent, tl.zeros_like(scale[p]))
        new_sums = ()
        for i in tl.static_range(M):
            gradient = _read_parts(grads[i], here, c, inside, True)
            more_direct = ()
            more_sent = ()
            for p in tl.static_range(P):
                more_direct = _and_one(more_direct, direct[p] + gradient[p])
                more_sent = _and_one(more_sent, sent[p] + gradient[p] * share[i * P + p])
                if (WANTED >> (i + 2)) & 1:
                    new_sums = _and_one(
                        new_sums, sum_share[i * P + p] + gradient[p] * difference[p]
                    )
                else:
                    new_sums = _and_one(new_sums, sum_share[i * P + p])
            direct = more_direct
            sent = more_sent
        sum_share = new_sums

        normed_too = _read_parts(grad_normed, here, c, inside, True)
        before_too = _read_parts(grad_before, here, c, inside, True)
        handed_on = tl.maximum(after - 1, 0).to(tl.int64) * C
        last_too = _read_parts(grad_last, handed_on, c, inside, after >= 0)
        grad_unit = ()
        along = ()
        new_scale = ()
        new_offset = ()
        new_back = ()
        for p in tl.static_range(P):
            total = direct[p] - sent[p] + normed_too[p] + last_too[p]
            to_before = sent[p] + before_too[p]
            write(grad_shift, at_shift + c[p], to_before, inside[p] & is_first)
            if WANTED & 1:
                new_scale = _and_one(new_scale, sum_scale[p] + total * unit[p])
            else:
                new_scale = _and_one(new_scale, sum_scale[p])
            if WANTED & 2:
                new_offset = _and_one(new_offset, sum_offset[p] + total)
            else:
                new_offset = _and_one(new_offset, sum_offset[p])
            new_back = _and_one(new_back, tl.where(is_first, 0.0, to_before))
            grad_unit = _and_one(grad_unit, total * scale[p])
            along = _and_one(along, grad_unit[p] * unit[p])
        sum_scale = new_scale
        sum_offset = new_offset
        sent_back = new_back
        if grad_x is not None:
            stream_too = _read_parts(grad_stream, here, c, inside, True)
            mean_grad = _total(grad_unit) / C
            mean_along = _total(along) / C
            for p in tl.static_range(P):
                result = rstd * (grad_unit[p] - mean_grad - unit[p] * mean_along)
                write(grad_x, here + c[p], result + stream_too[p], inside[p])
        unit = unit_before
        rstd = rstd_before

    target = partial + tl.program_id(0).to(tl.int64) * SUMS * C
    if WANTED & 1:
        for p in tl.static_range(P):
            tl.store(target + c[p], sum_scale[p], mask=inside[p])
        target += C
    if WANTED & 2:
        for p in tl.static_range(P):
            tl.store(target + c[p], sum_offset[p], mask=inside[p])
        target += C
    for i in tl.static_range(M):
        if (WANTED >> (i + 2)) & 1:
            for p in tl.static_range(P):
                tl.store(target + c[p], sum_share[i * P + p], mask=inside[p])
            target += C
