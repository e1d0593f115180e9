"""The Triton kernels of wkv7; wkv7_triton.py launches them and says what each is for.

Within a chunk of C tokens, with l_t = -exp(w_t) and L_t = l_1 + ... + l_t:

    u = X (A_ak V + a^ S^T)                   what the chunk's tokens write along b, [C, values]
    y = A_rk V + A_rb u + r^ S^T
    S' = S diag(e^L_C) + V^T k_ + u^T b_

where r^ = r e^L, a^ = a e^(L-l), k_ = k e^(L_C-L), b_ = b e^(L_C-L); A_xz = lower triangle of
(x e^L)(z e^-L)^T, strict for x = a; X = (I - A_ab)^-1. u is affine in S, so the chunk is too:

    S' = S (diag(e^L_C) + M) + c    M = (X a^)^T b_,      c = V^T k_ + (X A_ak V)^T b_
    y = y0 + R S^T                  R = r^ + A_rb X a^,   y0 = A_rk V + A_rb X A_ak V

M, c, R and y0 need no state and are made for all chunks at once; the scan that is left has one
matrix product a chunk. e^L and e^-L are taken relative to the chunk's middle, so that with
w <= -0.5 no factor passes e^(0.607 C/2), 2^28 at C = 64.
"""

import triton
import triton.language as tl

from rwkv.ops.triton_chunks import (
    add_product,
    exponent_of,
    narrow,
    narrow_where,
    power_below,
    power_of,
    product,
    sequence_slots,
    slot_tokens,
    widen,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_LOG2_E = tl.constexpr(0.5287663729448977)


@triton.jit
def _load(pointers, rows):
    return widen(tl.load(pointers, mask=rows, other=0.0))


@triton.jit
def _load_again(pointers, rows):
    """As `_load`, in a form that the compiler does not replace by registers full of old values."""
    return widen(tl.load(pointers, mask=rows, other=0.0, eviction_policy="evict_first"))


@triton.jit
def _largest(pointers, rows):
    """The power of two at or below the largest value of a tile that is loaded again later."""
    return power_below(widen(tl.load(pointers, mask=rows, other=0.0, eviction_policy="evict_last")))


@triton.jit
def _log2_decays(w, rows, ones, C: tl.constexpr, FINE: tl.constexpr):
    """For raw decays [C, N], in units of log2: L_t, L_(t-1), and the sums of l over both halves.

    L is relative to the middle. It is a product with `ones`, the lower triangle; l is rounded for
    it, by 2^-12 relative at most, before all else, so that every use of a decay agrees.
    """
    step_in = narrow(tl.where(rows, -tl.exp2(w * LOG2_E + LOG2_LOG2_E), 0.0), FINE)
    step = widen(step_in)
    halves = tl.sum(tl.reshape(step, (2, C // 2, step.shape[1])), axis=1)
    first = (tl.arange(0, 2) == 0)[:, None]
    middle = tl.sum(tl.where(first, halves, 0.0), axis=0)
    rest = tl.sum(tl.where(first, 0.0, halves), axis=0)
    L = product(ones, step_in) - middle[None, :]
    return L, L - step, middle, rest


@triton.jit
def _inverse_less_identity(A, C: tl.constexpr, FINE: tl.constexpr):
    """(I - A)^-1 - I for a strictly lower triangular A, [C, C]; FINE.

    Blocks on the diagonal are joined in pairs, from one row to C: the block below the diagonal of
    a joined inverse is X2 A21 X1. This is stable where powers of A are not: with equal keys in a
    row they grow like binomials.
    """
    t = tl.arange(0, C)
    apart = t[:, None] ^ t[None, :]
    zero = tl.zeros_like(A)
    total = tl.where(apart == 1, A, zero).to(tl.float32)
    X = narrow(total, FINE)
    for level in tl.static_range(1, 7):
        if 2**level < C:
            below = tl.where((apart >> level) == 1, A, zero)
            joined = add_product(below.to(tl.float32), X, below)
            total = add_product(total + joined, narrow(joined, FINE), X)
            X = narrow(total, FINE)
    return X


@triton.jit(do_not_specialize=["T", "H"])
def prepare_kernel(
    r,
    w,
    k,
    v,
    a,
    b,
    y,
    transition,
    drive,
    readout,
    inverse,
    decay,
    powers,
    owners,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Everything of a chunk that needs no state: M, c, R, y0, L_C and, with KEEP, X.

    c and R are stored divided by the powers of two in `powers`. X is stored without its unit
    diagonal. Backward finds what else it needs of a chunk in X's empty triangle: L_C in the first
    row where it fits, and below, in the last column, log2 of R's power and of the states'.
    """
    slot = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, left = slot_tokens(slot, owners, cu_seqlens, T, C)
    if left <= 0:
        return
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    rows = (t < left)[:, None]
    first = (start * H + h) * N
    tile = t[:, None] * (H * N) + n[None, :]
    unit = slot.to(tl.int64) * H + h
    strict = tl.where(t[:, None] > t[None, :], -1, 0).to(tl.int16)
    lower = tl.where(t[:, None] >= t[None, :], -1, 0).to(tl.int16)
    ones = narrow(tl.where(lower != 0, 1.0, 0.0), FINE)

    w_raw = _load(w + first + tile, rows)
    r_raw = _load(r + first + tile, rows)
    k_raw = _load(k + first + tile, rows)
    a_raw = _load(a + first + tile, rows)
    b_raw = _load(b + first + tile, rows)
    v_raw = _load(v + first + tile, rows)
    r_power = power_below(r_raw)
    k_power = power_below(k_raw)
    v_power = power_below(v_raw)
    L, L_before, middle, rest = _log2_decays(w_raw, rows, ones, C, FINE)
    scale_in = tl.exp2(middle)[None, :]
    scale_out = tl.exp2(rest)[None, :]
    grow = tl.exp2(-L)
    a_out = a_raw * tl.exp2(L_before)
    b_out = b_raw * grow
    k_out = k_raw * (grow * (1.0 / k_power))
    r_out = r_raw * (tl.exp2(L) * (1.0 / r_power))
    a_in = narrow(a_out, WIDE)
    b_in = narrow(b_out, WIDE)
    k_in = narrow(k_out, WIDE)
    r_in = narrow(r_out, WIDE)
    tl.store(decay + unit * N + n, middle + rest)
    tl.store(powers + unit * 2, r_power)
    tl.store(powers + unit * 2 + 1, k_power * v_power)

    A_ab = narrow_where(strict, product(a_in, tl.trans(b_in)), FINE)
    X = _inverse_less_identity(A_ab, C, FINE)
    if KEEP:
        inverse += unit * C * C
        tl.store(inverse + t[:, None] * C + t[None, :], X)
        tl.debug_barrier()  # the next stores replace some of X's zeros
        tl.store(inverse + 2 * C - 1, exponent_of(r_power))
        if C >= N:
            tl.store(inverse + n, middle + rest)

    Xa = a_out * scale_in
    Xa = narrow(add_product(Xa, X, narrow(Xa, FINE)), FINE)
    b_end = narrow(b_out * scale_out, FINE)
    square = n[:, None] * N + n[None, :]
    tl.store(transition + unit * N * N + square, narrow(product(tl.trans(Xa), b_end), FINE))

    A_rb = narrow_where(lower, product(r_in, tl.trans(b_in)), FINE)
    R = add_product(r_out * scale_in, A_rb, Xa)
    tl.store(readout + unit * C * N + t[:, None] * N + n[None, :], narrow(R, FINE))

    values = narrow(v_raw * (1.0 / v_power), FINE)
    A_ak = narrow_where(strict, product(a_in, tl.trans(k_in)), FINE)
    u = product(A_ak, values)
    u = narrow(add_product(u, X, narrow(u, FINE)), FINE)
    c = product(tl.trans(values), narrow(k_out * scale_out, FINE))
    c = add_product(c, tl.trans(u), b_end)
    tl.store(drive + unit * N * N + square, narrow(c, FINE))

    A_rk = narrow_where(lower, product(r_in, tl.trans(k_in)), FINE)
    y0 = add_product(product(A_rk, values), A_rb, u) * (r_power * k_power * v_power)
    tl.store(y + first + tile, narrow(y0, WIDE), mask=rows)


@triton.jit(do_not_specialize=["T", "H"])
def scan_kernel(
    initial,
    transition,
    drive,
    readout,
    decay,
    powers,
    y,
    states,
    inverse,
    final,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
    KEEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """S' = S diag(e^L_C) + S M + c from chunk to chunk for V value rows; y = y0 + R S^T."""
    blocks: tl.constexpr = N // V
    unit = tl.program_id(0) // blocks
    q = unit // H
    h = unit % H
    block = tl.program_id(0) % blocks
    begin, length, slot = sequence_slots(q, cu_seqlens, T, C)
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    row = block * V + tl.arange(0, V)
    square = row[:, None] * N + n[None, :]
    ends = unit.to(tl.int64) * N * N
    S = tl.load(initial + ends + square)
    for i in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        one = (slot + i) * H + h
        M = tl.load(transition + one * N * N + n[:, None] * N + n[None, :])
        c = tl.load(drive + one * N * N + square)
        R = tl.load(readout + one * C * N + t[None, :] * N + n[:, None])  # transposed
        keep = tl.exp2(tl.load(decay + one * N + n))[None, :]
        r_power = tl.load(powers + one * 2)
        c_power = tl.load(powers + one * 2 + 1)
        out = y + ((begin + i * C) * H + h) * N + t[None, :] * (H * N) + row[:, None]
        rows = (t < length - i * C)[None, :]
        y0 = _load(out, rows)

        power = power_below(S)
        before = narrow(S * (1.0 / power), FINE)
        if KEEP:
            tl.store(states + one * N * N + square, before)
            tl.store(inverse + (one * C + 3 + block) * C - 1, exponent_of(power))
        tl.store(out, narrow(y0 + product(before, R) * (power * r_power), WIDE), mask=rows)
        S = S * keep + c * c_power + product(before, M) * power
    tl.store(final + ends + square, S)


@triton.jit(do_not_specialize=["T", "H"])
def reverse_scan_kernel(
    grad_final,
    transition,
    readout,
    inverse,
    decay,
    grad_y,
    grad_states,
    grad_powers,
    grad_initial,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    FINE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dS = dS' diag(e^L_C) + dS' M^T + dy^T R, from the last chunk to the first, for V rows."""
    blocks: tl.constexpr = N // V
    unit = tl.program_id(0) // blocks
    q = unit // H
    h = unit % H
    block = tl.program_id(0) % blocks
    begin, length, slot = sequence_slots(q, cu_seqlens, T, C)
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    row = block * V + tl.arange(0, V)
    square = row[:, None] * N + n[None, :]
    ends = unit.to(tl.int64) * N * N
    dS = tl.load(grad_final + ends + square)
    chunks = tl.cdiv(length, C)
    for back in tl.range(0, chunks, num_stages=STAGES):
        i = chunks - 1 - back
        one = (slot + i) * H + h
        M = tl.load(transition + one * N * N + n[None, :] * N + n[:, None])  # transposed
        R = tl.load(readout + one * C * N + t[:, None] * N + n[None, :])
        if C >= N:
            keep = tl.load(inverse + one * C * C + n).to(tl.float32)
        else:
            keep = tl.load(decay + one * N + n)
        r_power = power_of(tl.load(inverse + one * C * C + 2 * C - 1))
        rows = (t < length - i * C)[None, :]
        dy = grad_y + ((begin + i * C) * H + h) * N + t[None, :] * (H * N) + row[:, None]
        dy = _load(dy, rows)

        power = power_below(dS)
        after = narrow(dS * (1.0 / power), FINE)
        tl.store(grad_states + one * N * N + square, after)
        tl.store(grad_powers + one * blocks + block, power)
        y_power = power_below(dy)
        read = product(narrow(dy * (1.0 / y_power), FINE), R) * (y_power * r_power)
        dS = dS * tl.exp2(keep)[None, :] + product(after, M) * power + read
    tl.store(grad_initial + ends + square, dS)


@triton.jit
def _sum_rows(ones, x, dtype: tl.constexpr):
    """ones @ x, nearly in float32: x as the sum of two float16."""
    high = narrow(x, dtype)
    total = product(ones, high)
    if dtype == tl.float16:
        total = add_product(total, ones, narrow(x - widen(high), dtype))
    return total


@triton.jit(do_not_specialize=["T", "H"])
def gradient_kernel(
    r,
    w,
    k,
    v,
    a,
    b,
    grad_y,
    states,
    grad_states,
    grad_powers,
    inverse,
    dr,
    dw,
    dk,
    dv,
    da,
    db,
    owners,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    GRAD_V: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """All gradients of one chunk, given the state before it and the gradient of the one after it.

    Tiles are divided by powers of two: r, k, v and dy by their own, u and S by one, its gradient
    and dS' by another, so that all products below come out in one unit, u_power * z_power. The
    gradient of a tile, times the tile, is its share of the gradient of L; there the factor is the
    same rounded operand that made the products, so that what must cancel cancels. Units of dr and
    dk come as two factors: where r or k are 0 in all of a chunk, one alone is infinite.
    """
    slot = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, left = slot_tokens(slot, owners, cu_seqlens, T, C)
    if left <= 0:
        return
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    rows = (t < left)[:, None]
    strict = tl.where(t[:, None] > t[None, :], -1, 0).to(tl.int16)
    lower = tl.where(t[:, None] >= t[None, :], -1, 0).to(tl.int16)
    first = (start * H + h) * N
    tile = t[:, None] * (H * N) + n[None, :]
    square = n[:, None] * N + n[None, :]
    unit = slot.to(tl.int64) * H + h
    inverse += unit * C * C
    ones = narrow(tl.where(lower != 0, 1.0, 0.0), FINE)

    r_power = _largest(r + first + tile, rows)
    k_power = _largest(k + first + tile, rows)
    v_power = _largest(v + first + tile, rows)
    y_power = _largest(grad_y + first + tile, rows)
    S_power = power_of(tl.load(inverse + (3 + n // V) * C - 1))
    dS_power = tl.load(grad_powers + unit * (N // GRAD_V) + n // GRAD_V)
    u_power = 8 * tl.maximum(k_power * v_power, tl.max(S_power, axis=0))
    z_power = 8 * tl.maximum(r_power * y_power, tl.max(dS_power, axis=0))
    u_share = k_power * v_power / u_power
    z_share = r_power * y_power / z_power

    # Value rows: what the chunk writes, u, the gradient dz of what it reads, and dv.
    L, L_before, middle, rest = _log2_decays(_load(w + first + tile, rows), rows, ones, C, FINE)
    grow = tl.exp2(-L)
    k_out = _load(k + first + tile, rows) * (grow * (1.0 / k_power))
    k_in = narrow(k_out, WIDE)
    k_end = narrow(k_out * tl.exp2(rest)[None, :], FINE)
    b_out = _load(b + first + tile, rows) * grow
    b_in = narrow(b_out, WIDE)
    b_end = narrow(b_out * tl.exp2(rest)[None, :], FINE)
    r_in = narrow(_load(r + first + tile, rows) * (tl.exp2(L) * (1.0 / r_power)), WIDE)
    a_out = _load(a + first + tile, rows) * tl.exp2(L_before)
    a_in = narrow(a_out, WIDE)
    a_start = narrow(a_out * tl.exp2(middle)[None, :], FINE)
    values = narrow(_load(v + first + tile, rows) * (1.0 / v_power), FINE)
    dy = narrow(_load(grad_y + first + tile, rows) * (1.0 / y_power), FINE)
    S = tl.load(states + unit * N * N + square) * (S_power / u_power).to(FINE)[:, None]
    dS = tl.load(grad_states + unit * N * N + square) * (dS_power / z_power).to(FINE)[:, None]
    X = tl.load(inverse + t[:, None] * C + t[None, :], mask=t[:, None] > t[None, :], other=0.0)

    A_ak = narrow_where(strict, product(a_in, tl.trans(k_in)), FINE)
    z = add_product(product(A_ak, values) * u_share, a_start, tl.trans(S))
    u = narrow(add_product(z, X, narrow(z, FINE)), FINE)
    A_rb = narrow_where(lower, product(r_in, tl.trans(b_in)), FINE)
    dz = add_product(product(tl.trans(A_rb), dy) * z_share, b_end, tl.trans(dS))
    dz = narrow(add_product(dz, tl.trans(X), narrow(dz, FINE)), FINE)
    A_rk = narrow_where(lower, product(r_in, tl.trans(k_in)), FINE)
    grad = add_product(product(tl.trans(A_rk), dy) * z_share, tl.trans(A_ak), dz)
    grad = add_product(grad, k_end, tl.trans(dS))
    tl.store(dv + first + tile, narrow(grad * (k_power * z_power), WIDE), mask=rows)

    # Key columns: the other gradients. Factors are made again, to keep registers free.
    step = _load_again(w + first + tile, rows)
    L, L_before, middle, rest = _log2_decays(step, rows, ones, C, FINE)
    scale_in = tl.exp2(middle)[None, :]
    scale_out = tl.exp2(rest)[None, :]
    grow = tl.exp2(-L)
    k_in = narrow(_load_again(k + first + tile, rows) * (grow * (1.0 / k_power)), WIDE)
    b_in = narrow(_load_again(b + first + tile, rows) * grow, WIDE)

    log2_unit = exponent_of(u_power) + exponent_of(z_power)
    dA_ak = narrow_where(strict, product(dz, tl.trans(values)) * u_share, WIDE)
    dA_ab = narrow_where(strict, product(dz, tl.trans(u)), WIDE)
    grad = product(dz, S) * scale_in
    grad = add_product(add_product(grad, dA_ak, k_in), dA_ab, b_in)
    out = tl.exp2(L_before + log2_unit)
    tl.store(da + first + tile, narrow(grad * out, WIDE), mask=rows)
    a_in = narrow(_load_again(a + first + tile, rows) * tl.exp2(L_before), WIDE)
    dL_before = widen(a_in) * grad

    dA_rk = narrow_where(lower, product(dy, tl.trans(values)) * (u_share * z_share), WIDE)
    dA_rb = narrow_where(lower, product(dy, tl.trans(u)) * z_share, WIDE)
    grad = product(dy, S) * (scale_in * z_share)
    grad = add_product(add_product(grad, dA_rk, k_in), dA_rb, b_in)
    half = (log2_unit - exponent_of(r_power)) * 0.5
    tl.store(dr + first + tile, narrow(grad * tl.exp2(L + half) * tl.exp2(half), WIDE), mask=rows)
    shrink = tl.exp2(L - exponent_of(r_power))
    r_in = narrow(_load_again(r + first + tile, rows) * shrink, WIDE)
    dL = dL_before + widen(r_in) * grad

    grad = product(values, dS) * (scale_out * u_share)
    factor = widen(k_in)
    dL_end = factor * grad
    grad = add_product(add_product(grad, tl.trans(dA_rk), r_in), tl.trans(dA_ak), a_in)
    half = (log2_unit - exponent_of(k_power)) * 0.5
    tl.store(dk + first + tile, narrow(grad * tl.exp2(half - L) * tl.exp2(half), WIDE), mask=rows)
    dL -= factor * grad

    grad = product(u, dS) * scale_out
    factor = widen(b_in)
    dL_end += factor * grad
    grad = add_product(add_product(grad, tl.trans(dA_rb), r_in), tl.trans(dA_ab), a_in)
    tl.store(db + first + tile, narrow(grad * tl.exp2(log2_unit - L), WIDE), mask=rows)
    dL -= factor * grad

    dl = _sum_rows(tl.trans(ones), dL, FINE) - dL_before
    dl += _sum_rows(tl.full((C, C), 1.0, FINE), dL_end, FINE)
    dl += tl.sum(widen(S) * widen(dS), axis=0)[None, :] * scale_in * scale_out
    dl *= -tl.exp2(_load(w + first + tile, rows) * LOG2_E + log2_unit)
    tl.store(dw + first + tile, narrow(dl, WIDE), mask=rows)
