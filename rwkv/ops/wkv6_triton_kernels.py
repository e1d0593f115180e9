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
So a chunk is cut into leaves in whose halves LIMIT bounds all decay: the whole chunk where that
will do, else a half or a quarter, else single tokens. Pairs of one leaf take its middle as their
point. Pairs of two leaves are found by halving: for t in the upper and s in the lower half of a
block, the decay from the middle to t and that from s to the middle are factors of at most 1.
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
def _load_again(pointers, rows):
    """As `_load`, in a form that the compiler does not replace by registers full of old values."""
    return widen(tl.load(pointers, mask=rows, other=0.0, eviction_policy="evict_first"))


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
    facts,
    decay,
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
    """What a chunk adds to the state, V^T (k e^Q), and L.

    In reverse what it adds to the gradient of the state, dY^T (r e^P), for (r, w, dy). The drive
    is stored divided by the powers of two of its two factors. These are the first two of a chunk's
    `facts`; the third is the size of its leaves.
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
        tl.store(facts + unit * 3 + 2, _leaf_size(widen(rate), C, LIMIT).to(tl.float32))
    keys = _load(x + tile, rows)
    key_power = power_below(keys)
    values = _load(z + tile, rows)
    value_power = power_below(values)
    keys = narrow(keys * (1.0 / key_power) * tl.exp2(-product(between, rate)), FINE)
    values = narrow(values * (1.0 / value_power), FINE)
    square = n[:, None] * N + n[None, :]
    tl.store(drive + unit * N * N + square, narrow(product(tl.trans(values), keys), FINE))
    tl.store(facts + unit * 3, key_power)
    tl.store(facts + unit * 3 + 1, value_power)


@triton.jit(do_not_specialize=["T", "H"])
def scan_kernel(
    initial,
    drive,
    facts,
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
        chunk = chunks - 1 - step if REVERSE else step
        one = (slot + chunk) * H + h
        added = tl.load(drive + one * N * N + square)
        rate = tl.load(decay + one * N + n)
        power = tl.load(facts + one * 3) * tl.load(facts + one * 3 + 1)
        state_power = power_below(S)
        tl.store(states + one * N * N + square, narrow(S * (1.0 / state_power), FINE))
        tl.store(state_powers + one * blocks + block, state_power)
        S = S * tl.exp2(-rate)[None, :] + widen(added) * power
    tl.store(final + ends + square, S)


@triton.jit
def _half_factors(r, w, k, rows, shrink_r, shrink_k, i, j, half, FINE: tl.constexpr):
    """r and k, scaled, with the decay between each token and the middle of its block; that too."""
    rate = narrow(_rates(_load_again(w, rows), rows), FINE)
    share = tl.exp2(-product(_to_half(i, j, half, FINE), rate))
    return (
        _load_again(r, rows) * shrink_r * share,
        _load_again(k, rows) * shrink_k * share,
        share,
    )


@triton.jit
def _add_halves(
    A,
    r,
    w,
    k,
    rows,
    shrink_r,
    shrink_k,
    leaf,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """A with the pairs of two leaves."""
    t = tl.arange(0, C)
    i, j = t[:, None], t[None, :]
    half = leaf
    while half < C:
        r_in, k_in, _ = _half_factors(r, w, k, rows, shrink_r, shrink_k, i, j, half, FINE)
        pairs = product(narrow(r_in, WIDE), tl.trans(narrow(k_in, WIDE)))
        A = tl.where(_half_pairs(i, j, half) != 0, pairs, A)
        half *= 2
    return A


@triton.jit(do_not_specialize=["T", "H"])
def output_kernel(
    r,
    w,
    k,
    v,
    u,
    facts,
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
    k_power = tl.load(facts + unit * 3)
    v_power = tl.load(facts + unit * 3 + 1)
    leaf = tl.load(facts + unit * 3 + 2).to(tl.int32)

    r_out = _load(r + tile, rows)
    k_out = _load(k + tile, rows)
    bonus = tl.sum(r_out * k_out * tl.load(u + h * N + n).to(tl.float32)[None, :], axis=1)
    r_power = power_below(r_out)
    r_out *= 1.0 / r_power
    rate = narrow(_rates(_load(w + tile, rows), rows), FINE)
    r_start = narrow(r_out * tl.exp2(-product(_matrix(i > j, FINE), rate)), FINE)
    row = tl.load(state_powers + unit * (N // V) + n // V)
    S = tl.load(states + unit * N * N + n[None, :] * N + n[:, None])  # transposed
    out = product(r_start, S) * (r_power * row)[None, :]

    used = product(_to_middle(i, j, leaf, FINE), rate)
    r_in = narrow(r_out * tl.exp2(-used), WIDE)
    k_in = narrow(k_out * (1.0 / k_power) * tl.exp2(used + widen(rate)), WIDE)
    A = tl.where(_leaf_pairs(i, j, leaf) != 0, product(r_in, tl.trans(k_in)), 0.0)
    shrink_r, shrink_k = 1.0 / r_power, 1.0 / k_power
    A = _add_halves(A, r + tile, w + tile, k + tile, rows, shrink_r, shrink_k, leaf, C, WIDE, FINE)
    v_out = _load(v + tile, rows)
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
    facts,
    states,
    state_powers,
    grad_facts,
    grad_states,
    grad_state_powers,
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

    k_power = tl.load(facts + unit * 3)
    v_power = tl.load(facts + unit * 3 + 1)
    leaf = tl.load(facts + unit * 3 + 2).to(tl.int32)
    r_power = tl.load(grad_facts + unit * 3)
    y_power = tl.load(grad_facts + unit * 3 + 1)
    shrink_r, shrink_k = 1.0 / r_power, 1.0 / k_power
    S_power = tl.max(tl.load(state_powers + unit * (N // V) + tl.arange(0, N // V)), axis=0)
    dS_power = tl.max(tl.load(grad_state_powers + unit * (N // V) + tl.arange(0, N // V)), axis=0)
    u_power = tl.maximum(k_power * v_power, S_power)
    z_power = tl.maximum(r_power * y_power, dS_power)
    u_share = k_power * v_power / u_power
    z_share = r_power * y_power / z_power
    S_share = S_power / u_power
    dS_share = dS_power / z_power
    row = tl.load(state_powers + unit * (N // V) + n // V) / S_power
    S = tl.load(states + unit * N * N + square) * row.to(FINE)[:, None]
    row = tl.load(grad_state_powers + unit * (N // V) + n // V) / dS_power
    dS = tl.load(grad_states + unit * N * N + square) * row.to(FINE)[:, None]

    # The bonus, and all that comes to v.
    bonus_u = tl.load(u + h * N + n).to(tl.float32)[None, :]
    v_out = _load(v + tile, rows)
    dy_out = _load(grad_y + tile, rows)
    own = tl.sum(v_out * dy_out, axis=1)[:, None]  # the gradient of r . u * k
    values = narrow(v_out * (1.0 / v_power), FINE)
    dy = narrow(dy_out * (1.0 / y_power), FINE)
    r_out = _load(r + tile, rows)
    k_out = _load(k + tile, rows)
    both = r_out * k_out
    tl.store(du + unit * N + n, tl.sum(own * both, axis=0))
    bonus = tl.sum(both * bonus_u, axis=1)[:, None]

    rate = narrow(_rates(_load(w + tile, rows), rows), FINE)
    middle = _to_middle(i, j, leaf, FINE)
    used = product(middle, rate)
    r_in = narrow(r_out * shrink_r * tl.exp2(-used), WIDE)
    k_in = narrow(k_out * shrink_k * tl.exp2(used + widen(rate)), WIDE)
    pairs = _leaf_pairs(i, j, leaf)
    A = tl.where(pairs != 0, product(r_in, tl.trans(k_in)), 0.0)
    A = _add_halves(A, r + tile, w + tile, k + tile, rows, shrink_r, shrink_k, leaf, C, WIDE, FINE)
    until = product(_matrix(i < j, FINE), rate)
    k_end = narrow(_load_again(k + tile, rows) * shrink_k * tl.exp2(-until), FINE)
    grad = product(tl.trans(narrow(A, FINE)), dy) * (r_power * k_power * y_power)
    grad += product(k_end, tl.trans(dS)) * (k_power * dS_power)
    grad += bonus * _load_again(grad_y + tile, rows)
    tl.store(dv + tile, narrow(grad, WIDE), mask=rows)

    # Pairs of two leaves.
    grad_r = tl.zeros((C, N), tl.float32)
    grad_k = tl.zeros((C, N), tl.float32)
    dl = tl.zeros((C, N), tl.float32)
    half = leaf
    while half < C:
        r_half, k_half, share = _half_factors(
            r + tile, w + tile, k + tile, rows, shrink_r, shrink_k, i, j, half, FINE
        )
        dA = narrow_where(_half_pairs(i, j, half), product(dy, tl.trans(values)), WIDE)
        # A token is in the upper or in the lower half: one of the two products is 0 there.
        grad = product(dA, narrow(k_half, WIDE))
        grad = add_product(grad, tl.trans(dA), narrow(r_half, WIDE))
        upper = (i & half) != 0
        exponent = narrow(grad * tl.where(upper, r_half, k_half), WIDE)
        dl = add_product(dl, tl.trans(_to_half(i, j, half, WIDE)), exponent)
        grad *= share
        grad_r += tl.where(upper, grad, 0.0)
        grad_k += tl.where(upper, 0.0, grad)
        half *= 2

    # Pairs of one leaf, and what goes through the states at both ends.
    used = product(middle, rate)
    dA = narrow_where(pairs, product(dy, tl.trans(values)), WIDE)
    grad = product(dA, k_in)
    shares = widen(r_in) * grad
    grad_r = (grad_r + grad * tl.exp2(-used)) * (y_power * k_power * v_power)
    earlier = _matrix(i > j, FINE)
    grad = product(dy, S) * tl.exp2(-product(earlier, rate))
    grad_r += grad * (y_power * S_power)
    entry = narrow(grad * _load_again(r + tile, rows) * (shrink_r * z_share * S_share), WIDE)
    grad_r += own * bonus_u * _load_again(k + tile, rows)
    tl.store(dr + tile, narrow(grad_r, WIDE), mask=rows)

    grad = product(tl.trans(dA), r_in)
    from_s = widen(k_in) * grad
    dl += _sum_exactly(tl.trans(middle), (shares - from_s) * (1 / 64), FINE) * 64 - from_s
    dl *= u_share * z_share
    grad_k = (grad_k + grad * tl.exp2(used + widen(rate))) * (v_power * r_power * y_power)
    grad = product(values, dS) * tl.exp2(-product(tl.trans(earlier), rate))
    grad_k += grad * (v_power * dS_power)
    exit = narrow(grad * _load_again(k + tile, rows) * (shrink_k * u_share * dS_share), WIDE)
    grad_k += own * bonus_u * _load_again(r + tile, rows)
    tl.store(dk + tile, narrow(grad_k, WIDE), mask=rows)

    earlier = _matrix(i > j, WIDE)
    dl = add_product(add_product(dl, tl.trans(earlier), entry), earlier, exit)
    keep = tl.exp2(-tl.load(decay + unit * N + n)) * (S_share * dS_share)
    dl += (tl.sum(widen(S) * widen(dS), axis=0) * keep)[None, :]
    rate_out = _rates(_load_again(w + tile, rows), rows)
    slope = tl.where(rate_out < MOST, rate_out, 0.0) * (-u_power * z_power / LOG2_E)
    tl.store(dw + tile, narrow(dl * slope, WIDE), mask=rows)
