"""Drawing the next token of each row in one Triton kernel, without sorting; see rwkv/sampling.py.

A filter keeps what lies above a threshold: the largest value t such that what is at least t amounts
to enough, in tokens (top_k) or in probability (top_p). A few passes over the row, each of which
tries WAYS values, leave an interval with few tokens in it; these are gathered, and there t is found
by bisection over the floats in their order, so that it is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv.sampling_flags import Sampling

BLOCK = 8192  # tokens of the vocabulary at once
COLUMNS = 2048  # of a block; a thread adds up over its rows
FEW = 4096  # tokens that are gathered
WAYS = 8  # parts of an interval that a pass tells apart
SHARED = (64 if torch.version.hip is None else 128) << 10  # bytes of shared memory of a block

# SplitMix64's, as in rwkv/sampling.py
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
SECOND = tl.constexpr(0x94D049BB133111EB - 2**64)


@triton.jit
def _order(x):
    """float32 -> int64 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _value(order):
    """The float32 of a place in the order."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _amounts(
    x_ptr,
    tried,
    top,
    V,
    MASS: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """How many of a row's values are at least tried [WAYS], and with MASS the sums of exp(x - top).

    Without MASS the number twice.
    """
    part = tl.arange(0, BLOCK // COLUMNS)[None, :, None]
    place = part * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    numbers = tl.zeros([WAYS, COLUMNS], tl.float32)
    masses = tl.zeros([WAYS, COLUMNS], tl.float32)
    for start in range(0, V, BLOCK):
        i = start + place
        x = tl.load(x_ptr + i, mask=i < V, other=float("-inf"))
        reached = x >= tried[:, None, None]
        numbers += tl.sum(tl.where(reached, 1.0, 0.0), 1)
        if MASS:
            masses += tl.sum(tl.where(reached, tl.exp(x - top), 0.0), 1)
    found = tl.sum(numbers, 1)
    return found, tl.sum(masses, 1) if MASS else found


@triton.jit
def _gathered(x_ptr, few_ptr, least, beyond, V, FEW: tl.constexpr, BLOCK: tl.constexpr):
    """The values of a row from `least` to below `beyond`, FEW at most; -inf for the others."""
    found = V * 0
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < V, other=float("-inf"))
        inside = (x >= least) & (x < beyond)
        one = inside.to(tl.int32)
        tl.store(few_ptr + found + tl.cumsum(one, 0) - one, x, mask=inside)
        found += tl.sum(one, 0)
    tl.debug_barrier()  # a thread may read what another one stored
    j = tl.arange(0, FEW)
    few = tl.load(few_ptr + j, mask=j < found, other=float("-inf"))
    tl.debug_barrier()  # the next filter may store here
    return few


@triton.jit
def _threshold(
    x_ptr,
    few_ptr,
    low,
    top,
    enough,
    V,
    MASS: tl.constexpr,
    WAYS: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The largest value from `low` to `top` with enough at and above it.

    enough: tokens, or with MASS a share of the probability of what is at least `low`.
    """
    way = tl.arange(0, WAYS)
    least, beyond = _order(low), _order(top) + 1  # the threshold lies from one to below the other
    from_least, from_beyond = top * 0 + V, top * 0  # tokens from there on
    above = top * 0  # the amount from `beyond` on
    need = top * 0 - 1  # not known before a sum over all
    while (beyond - least > 1) & (from_least - from_beyond > FEW):
        # Between floats of unlike size, the middle of their order is far from that of the values.
        near = least + (beyond - least) * way // WAYS
        part = way / WAYS
        far = _order(_value(least) * (1 - part) + _value(beyond) * part)
        order = tl.where(beyond - least < 16777216, near, far)
        numbers, amounts = _amounts(x_ptr, _value(order), top, V, MASS, WAYS, BLOCK, COLUMNS)
        need = tl.where(need < 0, _needed(enough, tl.max(amounts, 0), MASS), need)
        fits = amounts >= need
        least = tl.max(tl.where(fits, order, least), 0)
        beyond = tl.min(tl.where(fits, beyond, order), 0)
        from_least = tl.min(tl.where(fits, numbers, from_least), 0)
        from_beyond = tl.max(tl.where(fits, from_beyond, numbers), 0)
        above = tl.max(tl.where(fits, above, amounts), 0)
    if beyond - least > 1:
        few = _gathered(x_ptr, few_ptr, _value(least), _value(beyond), V, FEW, BLOCK)
        weight = tl.exp(few - top) if MASS else tl.where(few > float("-inf"), 1.0, 0.0)
        need = tl.where(need < 0, _needed(enough, tl.sum(weight, 0), MASS), need)
        while beyond - least > 1:
            middle = least + (beyond - least) // 2
            if above + tl.sum(tl.where(few >= _value(middle), weight, 0.0), 0) >= need:
                least = middle
            else:
                beyond = middle
    return _value(least)


@triton.jit
def _needed(enough, total, MASS: tl.constexpr):
    """The amount that is enough; with MASS more than nothing, so that a token is kept."""
    return tl.maximum(enough * total, 1e-30) if MASS else enough


@triton.jit
def _pick_kernel(
    logits_ptr,
    counts_ptr,
    banned_ptr,
    uniforms_ptr,
    x_ptr,
    tokens_ptr,
    V,
    temperature,
    top_k,
    top_p,
    presence,
    frequency,
    decay,
    GREEDY: tl.constexpr,
    COUNTS: tl.constexpr,
    FADES: tl.constexpr,
    BANNED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    WAYS: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program a row; x [B, V + FEW] takes the logits after penalties and temperature."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    counts_ptr += row * V
    x_ptr += row * (V + FEW)

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    worst = tl.full([BLOCK], float("inf"), tl.float32)
    places = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < V
        x = tl.load(logits_ptr + i, mask=inside, other=float("-inf")).to(tl.float32)
        if COUNTS:
            count = tl.load(counts_ptr + i, mask=inside, other=0.0)
            x = x - presence * tl.where(count > 0, 1.0, 0.0) - frequency * count
            if FADES:
                tl.store(counts_ptr + i, count * decay, mask=inside)
        if BANNED:
            banned = tl.load(banned_ptr + i, mask=inside, other=0)
            x = tl.where(banned != 0, float("-inf"), x)
        if not GREEDY:
            x = x / temperature
            tl.store(x_ptr + i, x, mask=inside)
            worst = tl.minimum(worst, tl.where(x > float("-inf"), x, float("inf")))
        places = tl.where(x > best, i, places)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, places, V), 0)
    tl.debug_barrier()  # a thread may read what another one stored

    if not GREEDY:
        least = tl.min(worst, 0)
        few_ptr = x_ptr + V
        if TOP_K:
            least = _threshold(
                x_ptr, few_ptr, least, top, top_k, V, False, WAYS, FEW, BLOCK, COLUMNS
            )
        if TOP_P:
            least = _threshold(
                x_ptr, few_ptr, least, top, top_p, V, True, WAYS, FEW, BLOCK, COLUMNS
            )
        block = tl.arange(0, BLOCKS)
        sums = tl.zeros([BLOCKS], tl.float64)
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < V, other=float("-inf"))
            weight = tl.where(x >= least, tl.exp(x - top), 0.0).to(tl.float64)
            sums = tl.where(block == start // BLOCK, tl.sum(weight, 0), sums)
        ends = tl.cumsum(sums, 0)
        target = tl.load(uniforms_ptr + row) * tl.max(ends, 0)
        last = tl.max(tl.where(sums > 0, block, 0), 0)
        chosen = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), last)
        below = tl.max(tl.where(block < chosen, ends, 0.0), 0)
        i = chosen * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < V, other=float("-inf"))
        weight = tl.where(x >= least, tl.exp(x - top), 0.0).to(tl.float64)
        reached = (below + tl.cumsum(weight, 0) > target) & (weight > 0)
        last = tl.max(tl.where(weight > 0, i, 0), 0)
        token = tl.min(tl.where(reached, i, last), 0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if COUNTS:
        tl.store(counts_ptr + token, tl.load(counts_ptr + token) + 1.0)


@triton.jit
def _shifted(x, bits: tl.constexpr):
    """x moved right without copying its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@triton.jit
def _mixed(x):
    x = x + GOLDEN
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


@triton.jit
def _uniform_kernel(rows_ptr, steps_ptr, out_ptr, seed, B, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < B
    x = _mixed(tl.zeros([BLOCK], tl.int64) + seed)
    x = _mixed(x + tl.load(rows_ptr + i, mask=inside, other=0) * GOLDEN)
    x = _mixed(x + tl.load(steps_ptr + i, mask=inside, other=0) * GOLDEN)
    x = _shifted(x, 16).to(tl.float64) * (1.0 / 281474976710656.0)  # 48 bits
    tl.store(out_ptr + i, x, mask=inside)


def uniform_numbers(seed: int, rows: Tensor, steps: Tensor) -> Tensor:
    """As rwkv.sampling.uniform_numbers."""
    out = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    seed = (seed + 2**63) % 2**64 - 2**63
    _uniform_kernel[(triton.cdiv(len(rows), 256),)](rows, steps, out, seed, len(rows), BLOCK=256)
    return out


def pick(
    logits: Tensor,
    sampling: Sampling,
    uniforms: Tensor,
    counts: Tensor | None,
    banned: Tensor | None,
) -> Tensor:
    """As rwkv.sampling.pick_tokens and count_tokens; the counts are changed in place."""
    (B, V), greedy = logits.shape, sampling.temperature == 0
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    x = logits if greedy else logits.new_empty(B, V + FEW, dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(V))
    _pick_kernel[(B,)](
        logits.contiguous(), x if counts is None else counts, x if banned is None else banned,
        uniforms, x, tokens, V,
        float(sampling.temperature), float(sampling.top_k), float(sampling.top_p),
        float(sampling.presence_penalty), float(sampling.frequency_penalty),
        float(sampling.penalty_decay),
        GREEDY=greedy, COUNTS=counts is not None, FADES=sampling.penalty_decay != 1,
        BANNED=banned is not None, TOP_K=0 < sampling.top_k < V, TOP_P=sampling.top_p < 1,
        BLOCKS=triton.next_power_of_2(triton.cdiv(V, block)), WAYS=WAYS, FEW=FEW,
        BLOCK=block, COLUMNS=min(COLUMNS, block), num_warps=16,
    )  # fmt: skip
    return tokens
