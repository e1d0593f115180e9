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
    return tl.load(pointers, mask=rows, other=0.0).to(tl.float32)


@triton.jit
def _load_again(pointers, rows):
    """As `_load`, in a form that the compiler does not replace by registers full of old values."""
    return tl.load(pointers, mask=rows, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _rates(w, rows):
    """-l in units of log2, for raw decays [C, N]; 0 beyond the end of the sequence."""
    return tl.where(rows, tl.minimum(tl.exp2(w * LOG2_E + LOG2_LOG2_E), MOST), 0.0)


@triton.jit
def _fits(sums, LIMIT: tl.constexpr):
    return tl.max(tl.max(sums, axis=1), axis=0) <= LIMIT


@triton.jit
def _leaf_size(rate, C: tl.constexpr, LIMIT: tl.constexpr):
    """The largest leaf, C, C / 2, C / 4 or 1 tokens, in whose halves no sum is above LIMIT.

    And the sums of both halves of the chunk, [2, N].
    """
    N: tl.constexpr = rate.shape[1]
    sums = tl.sum(tl.reshape(rate, (8, C // 8, N)), axis=1)
    leaf = tl.where(_fits(sums, LIMIT), C // 4, 1)
    sums = tl.sum(tl.reshape(sums, (4, 2, N)), axis=1)
    leaf = tl.where(_fits(sums, LIMIT), C // 2, leaf)
    sums = tl.sum(tl.reshape(sums, (2, 2, N)), axis=1)
    return tl.where(_fits(sums, LIMIT), C, leaf), sums


# Masks and matrices [C, C] for tokens t, a column, and j, a row.


@triton.jit
def _matrix(matrices, which, C: tl.constexpr):
    """One of `matrices`: made in the kernel it would cost more than the products with it."""
    t = tl.arange(0, C)
    return tl.load(matrices + which * (C * C) + t[:, None] * C + t[None, :])


@triton.jit
def _leaf_matrix(matrices, leaf, C: tl.constexpr):
    return _matrix(matrices, tl.where(leaf == 1, 3, C // leaf), C)


@triton.jit
def _between(low, j, high):
    """A mask: low <= j < high."""
    return tl.where((j >= low) & (j < high), -1, 0).to(tl.int16)


@triton.jit
def _half_pairs(t, j, half):
    """A mask: t in the upper and j in the lower half of one block."""
    first = t & (-2 * half)
    return _between(first, j, first + (t & half))


@triton.jit(do_not_specialize=["T", "H"])
def drive_kernel(
    x,
    w,
    z,
    matrices,
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
    """What a chunk adds to the state, V^T (k e^Q), and L as the sums of both halves.

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
    matrix = _matrix(matrices, 0, C)
    if not REVERSE:
        matrix = tl.trans(matrix)
        leaf, halves = _leaf_size(widen(rate), C, LIMIT)
        tl.store(facts + unit * 3 + 2, leaf.to(tl.float32))
        tl.store(decay + unit * 2 * N + tl.arange(0, 2)[:, None] * N + n[None, :], halves)
    keys = _load(x + tile, rows)
    key_power = power_below(keys)
    values = _load(z + tile, rows)
    value_power = power_below(values)
    keys = narrow(keys * (1.0 / key_power) * tl.exp2(-product(matrix, rate)), FINE)
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
        rate = tl.load(decay + one * 2 * N + n) + tl.load(decay + (one * 2 + 1) * N + n)
        power = tl.load(facts + one * 3) * tl.load(facts + one * 3 + 1)
        state_power = power_below(S)
        tl.store(states + one * N * N + square, narrow(S * (1.0 / state_power), FINE))
        tl.store(state_powers + one * blocks + block, state_power)
        S = S * tl.exp2(-rate)[None, :] + widen(added) * power
    tl.store(final + ends + square, S)


@triton.jit
def _opaque(pointer, C: tl.constexpr):
    """The size of leaves, and the tokens as a column, read so that the compiler does not make
    matrices of them outside of a loop, where they would fill the registers."""
    leaf = tl.load(pointer, volatile=True).to(tl.int32)
    return leaf, tl.arange(0, C)[:, None] + tl.minimum(leaf, 0)


@triton.jit
def _half_factors(r, w, k, rows, shrink_r, shrink_k, matrix, FINE: tl.constexpr):
    """r and k, scaled, with the decay between each token and the middle of its block; that too."""
    rate = narrow(_rates(_load_again(w, rows), rows), FINE)
    share = tl.exp2(-product(matrix, rate))
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
    matrices,
    t,
    j,
    leaf,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """A plus the products of pairs of two leaves."""
    half, which = C // 2, 5
    while half >= leaf:
        matrix = _matrix(matrices, which, C)
        r_in, k_in, _ = _half_factors(r, w, k, rows, shrink_r, shrink_k, matrix, FINE)
        pairs = product(narrow(r_in, WIDE), tl.trans(narrow(k_in, WIDE)))
        A += tl.where(_half_pairs(t, j, half) != 0, pairs, 0.0)
        half //= 2
        which += 1
    return A


@triton.jit(do_not_specialize=["T", "H"])
def output_kernel(
    r,
    w,
    k,
    v,
    u,
    matrices,
    decay,
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
    K: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """The outputs of one chunk, given the state before it; K key columns at a time."""
    slot = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, left = slot_tokens(slot, owners, cu_seqlens, T, C)
    if left <= 0:
        return
    t = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    n = tl.arange(0, N)
    rows = t < left
    first = (start * H + h) * N
    tile = first + t * (H * N) + n[None, :]
    unit = slot.to(tl.int64) * H + h
    k_power = tl.load(facts + unit * 3)
    v_power = tl.load(facts + unit * 3 + 1)
    r_power = power_below(_load(r + tile, rows))
    shrink_r, shrink_k = 1.0 / r_power, 1.0 / k_power

    A = tl.zeros((C, C), tl.float32)
    out = tl.zeros((C, N), tl.float32)
    bonus = tl.zeros((C,), tl.float32)
    for column in range(0, N, K):
        c = column + tl.arange(0, K)
        part = first + t * (H * N) + c[None, :]
        leaf, token = _opaque(facts + unit * 3 + 2, C)
        r_out = _load(r + part, rows) * shrink_r
        k_out = _load(k + part, rows) * shrink_k
        bonus += tl.sum(r_out * k_out * tl.load(u + h * N + c).to(tl.float32)[None, :], axis=1)
        rate = narrow(_rates(_load(w + part, rows), rows), FINE)
        used = product(_leaf_matrix(matrices, leaf, C), rate)
        shrink = tl.exp2(-used)
        r_in = narrow(r_out * shrink, WIDE)
        k_in = narrow(k_out * tl.exp2(used + widen(rate)), WIDE)
        A += tl.where(_between(token & -leaf, j, token) != 0, product(r_in, tl.trans(k_in)), 0.0)
        if leaf == C:
            shrink *= tl.exp2(-tl.load(decay + unit * 2 * N + c))[None, :]
        else:
            shrink = tl.exp2(-product(_matrix(matrices, 0, C), rate))
            A = _add_halves(
                *(A, r + part, w + part, k + part, rows, shrink_r, shrink_k),
                *(matrices, token, j, leaf, C, WIDE, FINE),
            )
        S = tl.load(states + unit * N * N + n[None, :] * N + c[:, None])  # transposed
        out = add_product(out, narrow(r_out * shrink, FINE), S)
    row = tl.load(state_powers + unit * (N // V) + n // V)
    v_out = _load(v + tile, rows)
    # The unit is the tokens' but where what they write is nothing beside the state.
    power = tl.maximum(k_power * v_power, tl.max(row, axis=0) * 2.0**-60)
    values = narrow(v_out * (k_power / power), FINE)
    out = add_product(out * (row / power)[None, :], narrow(A, FINE), values) * (r_power * power)
    out += (bonus * (r_power * k_power))[:, None] * v_out
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
    matrices,
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
    K: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """All gradients of one chunk, given the state before it and the gradient of the one after it.

    K key columns at a time. Tiles are divided by powers of two: r, k, v and dy by their own, S and
    dS by the largest of their rows. Products of r, dy and dS come in the unit `z_power`, those of
    k, v and S in `u_power`, so that all shares of dl are of one unit. The gradient of a factor,
    times the factor, is that of its exponent; within a leaf, where such shares cancel, the factor
    is the same rounded operand that made the products.
    """
    slot = tl.program_id(0) // H
    h = tl.program_id(0) % H
    unit = slot.to(tl.int64) * H + h
    n = tl.arange(0, N)
    start, left = slot_tokens(slot, owners, cu_seqlens, T, C)
    if left <= 0:
        tl.store(du + unit * N + n, tl.zeros((N,), tl.float32))
        return
    t = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    rows = t < left
    first = (start * H + h) * N
    tile = first + t * (H * N) + n[None, :]

    k_power = tl.load(facts + unit * 3)
    v_power = tl.load(facts + unit * 3 + 1)
    r_power = tl.load(grad_facts + unit * 3)
    y_power = tl.load(grad_facts + unit * 3 + 1)
    shrink_r, shrink_k = 1.0 / r_power, 1.0 / k_power
    S_powers = tl.load(state_powers + unit * (N // V) + n // V)
    dS_powers = tl.load(grad_state_powers + unit * (N // V) + n // V)
    S_power = tl.max(S_powers, axis=0)
    dS_power = tl.max(dS_powers, axis=0)
    S_scale = (S_powers / S_power).to(FINE)[:, None]
    dS_scale = (dS_powers / dS_power).to(FINE)[:, None]
    u_power = tl.maximum(k_power * v_power, S_power)
    z_power = tl.maximum(r_power * y_power, dS_power)
    u_share = k_power * v_power / u_power
    z_share = r_power * y_power / z_power
    S_share = S_power / u_power
    dS_share = dS_power / z_power

    v_out = _load(v + tile, rows)
    dy_out = _load(grad_y + tile, rows)
    own = tl.sum(v_out * dy_out, axis=1)[:, None]  # the gradient of r . u * k
    values = narrow(v_out * (1.0 / v_power), FINE)
    dy = narrow(dy_out * (1.0 / y_power), FINE)

    # The gradient of v, and that of u.
    A = tl.zeros((C, C), tl.float32)
    grad_v = tl.zeros((C, N), tl.float32)
    bonus = tl.zeros((C,), tl.float32)
    for column in range(0, N, K):
        c = column + tl.arange(0, K)
        part = first + t * (H * N) + c[None, :]
        leaf, token = _opaque(facts + unit * 3 + 2, C)
        r_out = _load(r + part, rows)
        k_out = _load(k + part, rows)
        both = r_out * k_out
        bonus += tl.sum(both * tl.load(u + h * N + c).to(tl.float32)[None, :], axis=1)
        tl.store(du + unit * N + c, tl.sum(own * both, axis=0))
        rate = narrow(_rates(_load(w + part, rows), rows), FINE)
        used = product(_leaf_matrix(matrices, leaf, C), rate)
        grow = tl.exp2(used + widen(rate))
        r_in = narrow(r_out * shrink_r * tl.exp2(-used), WIDE)
        k_in = narrow(k_out * shrink_k * grow, WIDE)
        A += tl.where(_between(token & -leaf, j, token) != 0, product(r_in, tl.trans(k_in)), 0.0)
        if leaf == C:
            grow *= tl.exp2(-tl.load(decay + (unit * 2 + 1) * N + c))[None, :]
        else:
            grow = tl.exp2(-product(tl.trans(_matrix(matrices, 0, C)), rate))
            A = _add_halves(
                *(A, r + part, w + part, k + part, rows, shrink_r, shrink_k),
                *(matrices, token, j, leaf, C, WIDE, FINE),
            )
        k_end = narrow(_load_again(k + part, rows) * shrink_k * grow, FINE)
        dS = tl.load(grad_states + unit * N * N + n[:, None] * N + c[None, :]) * dS_scale
        grad_v = add_product(grad_v, k_end, tl.trans(dS))
    grad_v *= k_power * dS_power
    grad_v += product(tl.trans(narrow(A, FINE)), dy) * (r_power * k_power * y_power)
    grad_v += bonus[:, None] * _load_again(grad_y + tile, rows)
    tl.store(dv + tile, narrow(grad_v, WIDE), mask=rows)

    # The gradients of r, k and w.
    leaf = tl.load(facts + unit * 3 + 2).to(tl.int32)
    dA_leaf = narrow_where(_between(t & -leaf, j, t), product(dy, tl.trans(values)), WIDE)
    for column in range(0, N, K):
        c = column + tl.arange(0, K)
        part = first + t * (H * N) + c[None, :]
        square = unit * N * N + n[:, None] * N + c[None, :]
        bonus_u = tl.load(u + h * N + c).to(tl.float32)[None, :]
        leaf, token = _opaque(facts + unit * 3 + 2, C)
        rate = narrow(_rates(_load(w + part, rows), rows), FINE)

        # Pairs of one leaf.
        middle = _leaf_matrix(matrices, leaf, C)
        used = product(middle, rate)
        shrink = tl.exp2(-used)
        grow = tl.exp2(used + widen(rate))
        r_in = narrow(_load(r + part, rows) * shrink_r * shrink, WIDE)
        k_in = narrow(_load(k + part, rows) * shrink_k * grow, WIDE)
        grad_r = product(dA_leaf, k_in)
        grad_k = product(tl.trans(dA_leaf), r_in)
        from_s = widen(k_in) * grad_k
        shares = (widen(r_in) * grad_r - from_s) * (1 / 64)
        dl = _sum_exactly(tl.trans(middle), shares, FINE) * 64 - from_s
        grad_r *= shrink
        grad_k *= grow

        # Pairs of two leaves.
        half, which = C // 2, 5
        while half >= leaf:
            matrix = _matrix(matrices, which, C)
            r_half, k_half, share = _half_factors(
                r + part, w + part, k + part, rows, shrink_r, shrink_k, matrix, FINE
            )
            pairs = product(dy, tl.trans(values))
            dA = narrow_where(_half_pairs(token, j, half), pairs, WIDE)
            # A token is in the upper or in the lower half: one of the two products is 0 there.
            grad = product(dA, narrow(k_half, WIDE))
            grad = add_product(grad, tl.trans(dA), narrow(r_half, WIDE))
            upper = (token & half) != 0
            exponent = narrow(grad * tl.where(upper, r_half, k_half), WIDE)
            dl = add_product(dl, tl.trans(narrow(widen(matrix), WIDE)), exponent)
            grad *= share
            grad_r += tl.where(upper, grad, 0.0)
            grad_k += tl.where(upper, 0.0, grad)
            half //= 2
            which += 1
        dl *= u_share * z_share

        # Through the states at both ends.
        earlier = _matrix(matrices, 0, C)
        head = tl.load(decay + unit * 2 * N + c)
        tail = tl.load(decay + (unit * 2 + 1) * N + c)
        if leaf == C:
            shrink *= tl.exp2(-head)[None, :]
            grow *= tl.exp2(-tail)[None, :]
        else:
            shrink = tl.exp2(-product(earlier, rate))
            grow = tl.exp2(-product(tl.trans(earlier), rate))
        S = tl.load(states + square) * S_scale
        r_out = _load_again(r + part, rows)
        k_out = _load_again(k + part, rows)
        grad = product(dy, S) * shrink
        entry = narrow(grad * r_out * (shrink_r * z_share * S_share), WIDE)
        grad_r = grad_r * (y_power * k_power * v_power) + grad * (y_power * S_power)
        grad_r += own * bonus_u * k_out
        tl.store(dr + part, narrow(grad_r, WIDE), mask=rows)

        dS = tl.load(grad_states + square) * dS_scale
        grad = product(values, dS) * grow
        exit = narrow(grad * k_out * (shrink_k * u_share * dS_share), WIDE)
        grad_k = grad_k * (v_power * r_power * y_power) + grad * (v_power * dS_power)
        grad_k += own * bonus_u * r_out
        tl.store(dk + part, narrow(grad_k, WIDE), mask=rows)

        earlier = narrow(widen(earlier), WIDE)
        dl = add_product(add_product(dl, tl.trans(earlier), entry), earlier, exit)
        keep = tl.exp2(-head - tail) * (S_share * dS_share)
        dl += (tl.sum(widen(S) * widen(dS), axis=0) * keep)[None, :]
        rate_out = _rates(_load_again(w + part, rows), rows)
        slope = tl.where(rate_out < MOST, rate_out, 0.0) * (-u_power * z_power / LOG2_E)
        tl.store(dw + part, narrow(dl * slope, WIDE), mask=rows)
