"""The Triton kernels of wkv6; wkv6_triton.py launches them and says what each is for.

Within a chunk of C tokens that starts from S and ends with S', with l_t = -exp(w_t),
P_t = l_1 + ... + l_(t-1) and Q_t = l_(t+1) + ... + l_C:

    S' = S diag(e^L) + V^T (k e^Q)                                        L = l_1 + ... + l_C
    y = A V + (r e^P) S^T + diag(r . u * k) V
    A[t, s] = sum_n r[t, n] k[s, n] e^(l[s + 1, n] + ... + l[t - 1, n])   for s < t

S' needs no A, so a drive V^T (k e^Q) is made for all chunks at once, the scan from chunk to chunk
is element by element, and all outputs follow at once. The gradient of the state goes the same way
backwards: dS = dS' diag(e^L) + dY^T (r e^P).

For A the weight of a pair must be a factor of t times a factor of s. Relative to one point of the
chunk, one of the two grows as the decay between there and the token, which RWKV-6 does not bound.
So a chunk is cut into leaves in whose halves LIMIT bounds all decay: the whole chunk where that will
do, else a half or a quarter, else single tokens. Pairs of one leaf take its middle as their point.
Pairs of two leaves are found by halving: for t in the upper and s in the lower half of a block, the
decay from the middle to t and that from s to the middle are both factors of at most 1.
Sums of l are products with matrices of 0, 1 and -1 and never differences of longer sums, so
nothing overflows and no digit is lost. A share of 2^-MOST or less that a token keeps is taken as
2^-MOST, with gradient 0.
"""

import triton
import triton.language as tl

from rwkv.ops.triton_chunks import (
    add_product,
    narrow,
    narrow_where,
    power_below,
    product,
    sequence_slots,
    slot_tokens,
    widen,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_LOG2_E = tl.constexpr(0.5287663729448977)
MOST = tl.constexpr(120.0)  # 2^MOST times a tile scaled to 1 is a finite bfloat16


@triton.jit
def _load(pointers, rows):
    return widen(tl.load(pointers, mask=rows, other=0.0))


@triton.jit
def _rates(w, rows):
    """-l in units of log2, for raw decays [C, N]; 0 beyond the end of the sequence."""
    return tl.where(rows, tl.minimum(tl.exp2(w * LOG2_E + LOG2_LOG2_E), MOST), 0.0)


@triton.jit
def _matrix(condition, dtype: tl.constexpr):
    return narrow(tl.where(condition, 1.0, 0.0), dtype)


@triton.jit
def _fits(sums, LIMIT: tl.constexpr):
    return tl.max(tl.max(sums, axis=1), axis=0) <= LIMIT


@triton.jit
def _leaf_size(rate, C: tl.constexpr, LIMIT: tl.constexpr):
    """The largest leaf, C, C / 2, C / 4 or 1 tokens, in whose halves no sum is above LIMIT."""
    N: tl.constexpr = rate.shape[1]
    sums = tl.sum(tl.reshape(rate, (8, C // 8, N)), axis=1)
    leaf = tl.where(_fits(sums, LIMIT), C // 4, 1)
    sums = tl.sum(tl.reshape(sums, (4, 2, N)), axis=1)
    leaf = tl.where(_fits(sums, LIMIT), C // 2, leaf)
    sums = tl.sum(tl.reshape(sums, (2, 2, N)), axis=1)
    return tl.where(_fits(sums, LIMIT), C, leaf)


@triton.jit
def _to_middle(t, j, leaf, dtype: tl.constexpr):
    """The matrix that sums l from the middle of t's leaf to before t, negative where t is first."""
    middle = (t & -leaf) + leaf // 2
    after = (j >= middle) & (j < t)
    before = (j < middle) & (j >= t)
    return narrow(tl.where(after, 1.0, tl.where(before, -1.0, 0.0)), dtype)


@triton.jit
def _to_half(t, j, half, dtype: tl.constexpr):
    """The matrix that sums l between t and the middle of its block of two halves, without t's."""
    return _matrix(((t ^ j) < half) & tl.where((t & half) != 0, j < t, j > t), dtype)


@triton.jit
def _leaf_pairs(t, s, leaf):
    """A mask: s before t in one leaf."""
    return tl.where((t > s) & ((t ^ s) < leaf), -1, 0).to(tl.int16)


@triton.jit
def _half_pairs(t, s, half):
    """A mask: t in the upper and s in the lower half of one block."""
    apart = t ^ s
    return tl.where((t > s) & (apart >= half) & (apart < 2 * half), -1, 0).to(tl.int16)


@triton.jit(do_not_specialize=["T", "H"])
def drive_kernel(
    x,
    w,
    z,
    drive,
    powers,
    decay,
    leaves,
    owners,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    FINE: tl.constexpr,
    LIMIT: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What a chunk adds to the state, V^T (k e^Q), with L and the size of its leaves.

    In reverse what it adds to the gradient of the state, dY^T (r e^P), for (r, w, dy). The drive is stored divided by the power of two in `powers`.
    """
    slot = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, left = slot_tokens(slot, owners, cu_seqlens, T, C)
    if left <= 0:
        return
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    rows = (t < left)[:, None]
    tile = (start * H + h) * N + t[:, None] * (H * N) + n[None, :]
    unit = slot.to(tl.int64) * H + h

    rate = narrow(_rates(_load(w + tile, rows), rows), FINE)
    if REVERSE:
        between = _matrix(t[:, None] > t[None, :], FINE)
    else:
        between = _matrix(t[:, None] < t[None, :], FINE)
        tl.store(decay + unit * N + n, tl.sum(widen(rate), axis=0))
        tl.store(leaves + unit, _leaf_size(widen(rate), C, LIMIT))
    keys = _load(x + tile, rows)
    key_power = power_below(keys)
    values = _load(z + tile, rows)
    value_power = power_below(values)
    keys = narrow(keys * (1.0 / key_power) * tl.exp2(-product(between, rate)), FINE)
    values = narrow(values * (1.0 / value_power), FINE)
    square = n[:, None] * N + n[None, :]
    tl.store(drive + unit * N * N + square, narrow(product(tl.trans(values), keys), FINE))
    tl.store(powers + unit, key_power * value_power)


@triton.jit(do_not_specialize=["T", "H"])
def scan_kernel(
    initial,
    drive,
    powers,
    decay,
    states,
    state_powers,
    final,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    FINE: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """S' = S diag(e^L) + drive from chunk to chunk for V value rows, storing each S.

    In reverse from the last chunk to the first. S is stored divided by the power of two in
    `state_powers`.
    """
    blocks: tl.constexpr = N // V
    unit = tl.program_id(0) // blocks
    q = unit // H
    h = unit % H
    block = tl.program_id(0) % blocks
    _, length, slot = sequence_slots(q, cu_seqlens, T, C)
    n = tl.arange(0, N)
    square = (block * V + tl.arange(0, V))[:, None] * N + n[None, :]
    ends = unit.to(tl.int64) * N * N
    S = tl.load(initial + ends + square)
    chunks = tl.cdiv(length, C)
    for step in tl.range(0, chunks, num_stages=STAGES):
        if REVERSE:
            one = (slot + chunks - 1 - step) * H + h
        else:
            one = (slot + step) * H + h
        added = tl.load(drive + one * N * N + square)
        rate = tl.load(decay + one * N + n)
        power = tl.load(powers + one)
        state_power = power_below(S)
        tl.store(states + one * N * N + square, narrow(S * (1.0 / state_power), FINE))
        tl.store(state_powers + one * blocks + block, state_power)
        S = S * tl.exp2(-rate)[None, :] + widen(added) * power
    tl.store(final + ends + square, S)


@triton.jit(do_not_specialize=["T", "H"])
def output_kernel(
    r,
    w,
    k,
    v,
    u,
    leaves,
    states,
    state_powers,
    y,
    owners,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """The outputs of one chunk, given the state before it."""
    slot = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, left = slot_tokens(slot, owners, cu_seqlens, T, C)
    if left <= 0:
        return
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    i, j = t[:, None], t[None, :]
    rows = (t < left)[:, None]
    tile = (start * H + h) * N + t[:, None] * (H * N) + n[None, :]
    unit = slot.to(tl.int64) * H + h

    w_raw = _load(w + tile, rows)
    r_out = _load(r + tile, rows)
    k_out = _load(k + tile, rows)
    v_out = _load(v + tile, rows)
    bonus = tl.sum(r_out * k_out * tl.load(u + h * N + n).to(tl.float32)[None, :], axis=1)
    r_power = power_below(r_out)
    k_power = power_below(k_out)
    v_power = power_below(v_out)
    r_out *= 1.0 / r_power
    k_out *= 1.0 / k_power
    rate = narrow(_rates(w_raw, rows), FINE)
    leaf = tl.load(leaves + unit)

    used = product(_to_middle(i, j, leaf, FINE), rate)
    r_in = narrow(r_out * tl.exp2(-used), WIDE)
    k_in = narrow(k_out * tl.exp2(used + widen(rate)), WIDE)
    A = tl.where(_leaf_pairs(i, j, leaf) != 0, product(r_in, tl.trans(k_in)), 0.0)
    half = leaf
    while half < C:
        share = tl.exp2(-product(_to_half(i, j, half, FINE), rate))
        r_in = narrow(r_out * share, WIDE)
        k_in = narrow(k_out * share, WIDE)
        A = tl.where(_half_pairs(i, j, half) != 0, product(r_in, tl.trans(k_in)), A)
        half *= 2

    r_start = narrow(r_out * tl.exp2(-product(_matrix(i > j, FINE), rate)), FINE)
    row = tl.load(state_powers + unit * (N // V) + n // V)
    S = tl.load(states + unit * N * N + n[None, :] * N + n[:, None])  # transposed
    out = product(r_start, S) * (r_power * row)[None, :]
    values = narrow(v_out * (1.0 / v_power), FINE)
    out += product(narrow(A, FINE), values) * (r_power * k_power * v_power)
    out += bonus[:, None] * v_out
    tl.store(y + tile, narrow(out, WIDE), mask=rows)


@triton.jit
def _sum_exactly(matrix, x, dtype: tl.constexpr):
    """matrix @ x, nearly in float32: x as the sum of two float16."""
    high = narrow(x, dtype)
    total = product(matrix, high)
    if dtype == tl.float16:
        total = add_product(total, matrix, narrow(x - widen(high), dtype))
    return total


@triton.jit(do_not_specialize=["T", "H"])
def gradient_kernel(
    r,
    w,
    k,
    v,
    u,
    grad_y,
    decay,
    leaves,
    states,
    state_powers,
    grad_states,
    grad_powers,
    dr,
    dw,
    dk,
    dv,
    du,
    owners,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """All gradients of one chunk, given the state before it and the gradient of the one after it.

    Tiles are divided by powers of two: r, k, v and dy by their own, S and dS by the largest of
    their rows. Products of r, dy and dS come in the unit `z_power`, those of k, v and S in
    `u_power`, so that all shares of dl are of one unit. The gradient of a factor, times the factor,
    is that of its exponent; within a leaf, where such shares cancel, the factor is the same rounded
    operand that made the products.
    """
    slot = tl.program_id(0) // H
    h = tl.program_id(0) % H
    unit = slot.to(tl.int64) * H + h
    n = tl.arange(0, N)
    start, left = slot_tokens(slot, owners, cu_seqlens, T, C)
    if left <= 0:
        tl.store(du + unit * N + n, tl.zeros((N,), tl.float32))
        return
    t = tl.arange(0, C)
    i, j = t[:, None], t[None, :]
    rows = (t < left)[:, None]
    tile = (start * H + h) * N + t[:, None] * (H * N) + n[None, :]
    square = n[:, None] * N + n[None, :]

    v_out = _load(v + tile, rows)
    dy_out = _load(grad_y + tile, rows)
    own = tl.sum(v_out * dy_out, axis=1)[:, None]  # the gradient of r . u * k
    v_power = power_below(v_out)
    y_power = power_below(dy_out)
    values = narrow(v_out * (1.0 / v_power), FINE)
    dy = narrow(dy_out * (1.0 / y_power), FINE)

    r_out = _load(r + tile, rows)
    k_out = _load(k + tile, rows)
    bonus_u = tl.load(u + h * N + n).to(tl.float32)[None, :]
    tl.store(du + unit * N + n, tl.sum(own * r_out * k_out, axis=0))
    bonus = tl.sum(r_out * bonus_u * k_out, axis=1)[:, None]
    r_power = power_below(r_out)
    k_power = power_below(k_out)
    r_out *= 1.0 / r_power
    k_out *= 1.0 / k_power

    S_powers = tl.load(state_powers + unit * (N // V) + n // V)
    dS_powers = tl.load(grad_powers + unit * (N // V) + n // V)
    S_power = tl.max(S_powers, axis=0)
    dS_power = tl.max(dS_powers, axis=0)
    u_power = tl.maximum(k_power * v_power, S_power)
    z_power = tl.maximum(r_power * y_power, dS_power)
    u_share = k_power * v_power / u_power
    z_share = r_power * y_power / z_power
    S_share = S_power / u_power
    dS_share = dS_power / z_power

    rate = narrow(_rates(_load(w + tile, rows), rows), FINE)
    total = tl.load(decay + unit * N + n)
    leaf = tl.load(leaves + unit)

    # Pairs of one leaf.
    matrix = _to_middle(i, j, leaf, FINE)
    used = product(matrix, rate)
    grow = tl.exp2(used + widen(rate))
    shrink = tl.exp2(-used)
    r_in = narrow(r_out * shrink, WIDE)
    k_in = narrow(k_out * grow, WIDE)
    pairs = _leaf_pairs(i, j, leaf)
    A = tl.where(pairs != 0, product(r_in, tl.trans(k_in)), 0.0)
    dA_leaf = narrow_where(pairs, product(dy, tl.trans(values)), WIDE)
    grad_r = product(dA_leaf, k_in)
    grad_k = product(tl.trans(dA_leaf), r_in)
    from_s = widen(k_in) * grad_k
    shares = (widen(r_in) * grad_r - from_s) * (1 / 64)
    dl = _sum_exactly(tl.trans(matrix), shares, FINE) * 64 - from_s
    grad_r *= shrink
    grad_k *= grow

    # Pairs of two leaves.
    half = leaf
    while half < C:
        share = tl.exp2(-product(_to_half(i, j, half, FINE), rate))
        r_in = narrow(r_out * share, WIDE)
        k_in = narrow(k_out * share, WIDE)
        pairs = _half_pairs(i, j, half)
        A = tl.where(pairs != 0, product(r_in, tl.trans(k_in)), A)
        dA_half = narrow_where(pairs, product(dy, tl.trans(values)), WIDE)
        # A token is in the upper or in the lower half: one of the two products is 0 there.
        grad = add_product(product(dA_half, k_in), tl.trans(dA_half), r_in) * share
        upper = (i & half) != 0
        grad_r += tl.where(upper, grad, 0.0)
        grad_k += tl.where(upper, 0.0, grad)
        dl += product(
            tl.trans(_to_half(i, j, half, WIDE)), narrow(grad * tl.where(upper, r_out, k_out), WIDE)
        )
        half *= 2
    dl *= u_share * z_share

    # Through the states at both ends.
    matrix = _matrix(i > j, FINE)
    S = tl.load(states + unit * N * N + square) * (S_powers / S_power).to(FINE)[:, None]
    share = tl.exp2(-product(matrix, rate))
    grad = product(dy, S) * share
    entry = narrow(grad * r_out * (z_share * S_share), WIDE)
    grad_r = grad_r * (y_power * k_power * v_power) + grad * (y_power * S_power)
    tl.store(dr + tile, narrow(grad_r + own * bonus_u * (k_out * k_power), WIDE), mask=rows)

    dS = tl.load(grad_states + unit * N * N + square) * (dS_powers / dS_power).to(FINE)[:, None]
    share = tl.exp2(-product(tl.trans(matrix), rate))
    grad = product(values, dS) * share
    exit = narrow(grad * k_out * (u_share * dS_share), WIDE)
    grad_k = grad_k * (v_power * r_power * y_power) + grad * (v_power * dS_power)
    tl.store(dk + tile, narrow(grad_k + own * bonus_u * (r_out * r_power), WIDE), mask=rows)

    through = tl.sum(widen(S) * widen(dS), axis=0) * tl.exp2(-total) * (S_share * dS_share)
    matrix = _matrix(i > j, WIDE)
    dl += add_product(product(tl.trans(matrix), entry), matrix, exit) + through[None, :]
    rate_out = _rates(_load(w + tile, rows), rows)
    slope = tl.where(rate_out < MOST, rate_out, 0.0) * (-1.0 / LOG2_E)
    tl.store(dw + tile, narrow(dl * slope * (u_power * z_power), WIDE), mask=rows)

    k_end = narrow(k_out * share, FINE)
    grad = product(tl.trans(narrow(A, FINE)), dy) * (r_power * k_power * y_power)
    grad += product(k_end, tl.trans(dS)) * (k_power * dS_power) + bonus * dy_out
    tl.store(dv + tile, narrow(grad, WIDE), mask=rows)
