"""Drawing the next token of each row in one Triton kernel, without sorting; see rwkv/sampling.py.

A filter keeps what lies above a threshold: the largest value t such that what is at least t amounts
to enough, in tokens (top_k) or in probability (top_p). It is found by bisection over the floats in
their order, so that it is exact; a row is small enough to stay in the cache meanwhile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv.sampling_flags import Sampling

BLOCK = 8192  # tokens of the vocabulary at once


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
def _amount(x_ptr, least, top, V, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many values of a row are at least `least`, or with MASS their sum of exp(x - top)."""
    found = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < V, other=float("-inf"))
        if MASS:
            found += tl.where(x >= least, tl.exp(x - top), 0.0)
        else:
            found += tl.where(x >= least, 1.0, 0.0)
    return tl.sum(found, 0)


@triton.jit
def _threshold(x_ptr, low, top, need, V, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest value from `low` to `top` with `need` or more at and above it."""
    least, beyond = _order(low), _order(top) + 1
    while beyond - least > 1:
        middle = least + (beyond - least) // 2
        if _amount(x_ptr, _value(middle), top, V, MASS, BLOCK) >= need:
            least = middle
        else:
            beyond = middle
    return _value(least)


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
    BLOCK: tl.constexpr,
):
    """A program a row; x [B, V] takes the logits after penalties and temperature."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    counts_ptr += row * V
    x_ptr += row * V

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    places = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < V
        x = tl.load(logits_ptr + i, mask=inside, other=float("-inf")).to(tl.float32)
        if COUNTS:
            count = tl.load(counts_ptr + i, mask=inside, other=0.0)
            x = x - presence * tl.where(count > 0, 1.0, 0.0) - frequency * count
        if BANNED:
            banned = tl.load(banned_ptr + i, mask=inside, other=0)
            x = tl.where(banned != 0, float("-inf"), x)
        if not GREEDY:
            x = x / temperature
            tl.store(x_ptr + i, x, mask=inside)
        places = tl.where(x > best, i, places)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, places, V), 0)

    if not GREEDY:
        tl.debug_barrier()  # a thread may read what another one stored
        least = top * 0 - 3.4028234663852886e38  # the lowest finite float32
        if TOP_K:
            least = _threshold(x_ptr, least, top, top_k, V, False, BLOCK)
        if TOP_P:
            need = top_p * _amount(x_ptr, least, top, V, True, BLOCK)
            least = _threshold(x_ptr, least, top, need, V, True, BLOCK)
        total = top.to(tl.float64) * 0
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < V, other=float("-inf"))
            total += tl.sum(tl.where(x >= least, tl.exp(x - top), 0.0).to(tl.float64), 0)
        target = tl.load(uniforms_ptr + row) * total
        below = total * 0
        found = 0
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < V, other=float("-inf"))
            weight = tl.where(x >= least, tl.exp(x - top), 0.0).to(tl.float64)
            here = tl.sum(weight, 0)
            if (found == 0) & (below + here > target):
                reached = below + tl.cumsum(weight, 0) > target
                last = tl.max(tl.where(weight > 0, i, 0), 0)
                token = tl.min(tl.where(reached & (weight > 0), i, last), 0)
                found = 1
            below += here
    tl.store(tokens_ptr + row, token.to(tl.int64))

    if COUNTS:
        tl.debug_barrier()
        if FADES:
            for start in range(0, V, BLOCK):
                i = start + tl.arange(0, BLOCK)
                count = tl.load(counts_ptr + i, mask=i < V, other=0.0) * decay
                tl.store(counts_ptr + i, count + tl.where(i == token, 1.0, 0.0), mask=i < V)
        else:
            tl.store(counts_ptr + token, tl.load(counts_ptr + token) + 1.0)


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
    x = logits if greedy else torch.empty(B, V, dtype=torch.float32, device=logits.device)
    _pick_kernel[(B,)](
        logits.contiguous(), x if counts is None else counts, x if banned is None else banned,
        uniforms, x, tokens, V,
        float(sampling.temperature), float(sampling.top_k), float(sampling.top_p),
        float(sampling.presence_penalty), float(sampling.frequency_penalty),
        float(sampling.penalty_decay),
        GREEDY=greedy, COUNTS=counts is not None, FADES=sampling.penalty_decay != 1,
        BANNED=banned is not None, TOP_K=0 < sampling.top_k < V, TOP_P=sampling.top_p < 1,
        BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=16,
    )  # fmt: skip
    return tokens
