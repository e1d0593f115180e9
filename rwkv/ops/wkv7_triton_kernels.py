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
    power_below,
    power_of,
    product,
    sequence_slots,
    slot_tokens,
)


@triton.jit
def _log_decays(w, rows, C: tl.constexpr):
    """For raw decays [C, N]: l, L - L_middle, L_middle and L_C - L_middle."""
    log_decay = tl.where(rows, -tl.exp(w.to(tl.float32)), 0.0)
    first_half = (tl.arange(0, C) < C // 2)[:, None]
    middle = tl.sum(tl.where(first_half, log_decay, 0.0), axis=0)
    rest = tl.sum(tl.where(first_half, 0.0, log_decay), axis=0)
    return log_decay, tl.cumsum(log_decay, axis=0) - middle[None, :], middle, rest


@triton.jit
def _inverse_less_identity(A, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I - A)^-1 - I for a strictly lower triangular A, [C, C], float32.

    Blocks of 16 on the diagonal by forward substitution in float32, column by column, then pairs
    of blocks are joined: the block below the diagonal of the joined inverse is X2 A21 X1. Both are
    stable where powers of A are not (equal keys in a row make them grow like binomials).
    """
    G: tl.constexpr = C // 16
    g = tl.arange(0, G)
    same = g[:, None, None, None] == g[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(A, (G, 16, G, 16)), 0.0), axis=2)  # [G, 16, 16]
    i = tl.arange(0, 16)
    X = blocks
    for j in tl.static_range(1, 15):
        column = tl.sum(tl.where(i[None, None, :] == j, blocks, 0.0), axis=2)
        row = tl.sum(tl.where(i[None, :, None] == j, X, 0.0), axis=1)
        X += column[:, :, None] * row[:, None, :]
    wide = tl.broadcast_to(X[:, :, None, :], (G, 16, G, 16))
    X = tl.reshape(tl.where(same, wide, 0.0), (C, C))
    t = tl.arange(0, C)
    for level in tl.static_range(4, 7):
        if 2**level < C:
            row = t[:, None] >> level
            column = t[None, :] >> level
            below = tl.where((row == column + 1) & (row % 2 == 1), A, 0.0)
            below = tl.dot(X, below, below, input_precision=PRECISION)
            X += tl.dot(below, X, below, input_precision=PRECISION)
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
    PRECISION: tl.constexpr,
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

    log_decay, L, middle, rest = _log_decays(
        tl.load(w + first + tile, mask=rows, other=0.0), rows, C
    )
    scale_in = tl.exp(middle)[None, :]
    scale_out = tl.exp(rest)[None, :]
    grow = tl.exp(-L)
    r_raw = tl.load(r + first + tile, mask=rows, other=0.0)
    k_raw = tl.load(k + first + tile, mask=rows, other=0.0)
    v_raw = tl.load(v + first + tile, mask=rows, other=0.0)
    r_power, r_shrink = power_below(r_raw)
    k_power, k_shrink = power_below(k_raw)
    v_power, v_shrink = power_below(v_raw)
    k_out = k_raw * grow * k_shrink
    b_out = tl.load(b + first + tile, mask=rows, other=0.0) * grow
    a_out = tl.load(a + first + tile, mask=rows, other=0.0) * tl.exp(L - log_decay)
    r_out = r_raw * tl.exp(L) * r_shrink
    r_in = narrow(r_out, WIDE)
    k_in = narrow(k_out, WIDE)
    a_in = narrow(a_out, WIDE)
    b_in = narrow(b_out, WIDE)
    values = narrow(v_raw * v_shrink, FINE)
    b_end = narrow(b_out * scale_out, FINE)
    tl.store(decay + unit * N + n, middle + rest)
    tl.store(powers + unit * 2, r_power)
    tl.store(powers + unit * 2 + 1, k_power * v_power)

    strict = t[:, None] > t[None, :]
    lower = t[:, None] >= t[None, :]
    A_ab = tl.where(strict, product(a_in, tl.trans(b_in)), 0.0)
    X = narrow(_inverse_less_identity(A_ab, C, PRECISION), FINE)
    if KEEP:
        square = inverse + unit * C * C
        tl.store(square + t[:, None] * C + t[None, :], X, mask=strict)
        tl.store(square + 2 * C - 1, exponent_of(r_power))
        if C >= N:
            tl.store(square + n, middle + rest)

    Xa = a_out * scale_in
    Xa = narrow(add_product(Xa, X, narrow(Xa, FINE)), FINE)
    square = n[:, None] * N + n[None, :]
    tl.store(transition + unit * N * N + square, narrow(product(tl.trans(Xa), b_end), FINE))

    A_rb = narrow(tl.where(lower, product(r_in, tl.trans(b_in)), 0.0), FINE)
    R = add_product(r_out * scale_in, A_rb, Xa)
    tl.store(readout + unit * C * N + t[:, None] * N + n[None, :], narrow(R, FINE))

    A_ak = narrow(tl.where(strict, product(a_in, tl.trans(k_in)), 0.0), FINE)
    u = product(A_ak, values)
    u = narrow(add_product(u, X, narrow(u, FINE)), FINE)
    A_rk = narrow(tl.where(lower, product(r_in, tl.trans(k_in)), 0.0), FINE)
    y0 = add_product(product(A_rk, values), A_rb, u) * (r_power * k_power * v_power)
    tl.store(y + first + tile, narrow(y0, WIDE), mask=rows)

    c = product(tl.trans(values), narrow(k_out * scale_out, FINE))
    tl.store(drive + unit * N * N + square, narrow(add_product(c, tl.trans(u), b_end), FINE))


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
        keep = tl.exp(tl.load(decay + one * N + n))[None, :]
        r_power = tl.load(powers + one * 2)
        c_power = tl.load(powers + one * 2 + 1)
        out = y + ((begin + i * C) * H + h) * N + t[None, :] * (H * N) + row[:, None]
        rows = (t < length - i * C)[None, :]
        y0 = tl.load(out, mask=rows, other=0.0)

        power, shrink = power_below(S)
        before = narrow(S * shrink, FINE)
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
        dy = tl.load(dy, mask=rows, other=0.0)

        power, shrink = power_below(dS)
        after = narrow(dS * shrink, FINE)
        tl.store(grad_states + one * N * N + square, after)
        tl.store(grad_powers + one * blocks + block, power)
        y_power, y_shrink = power_below(dy)
        read = product(narrow(dy * y_shrink, FINE), R) * (y_power * r_power)
        dS = dS * tl.exp(keep)[None, :] + product(after, M) * power + read
    tl.store(grad_initial + ends + square, dS)


@triton.jit
def _row_gradients(
    r,
    w,
    k,
    v,
    a,
    b,
    grad_y,
    states,
    grad_states,
    inverse,
    dv,
    S_power,
    dS_power,
    tile,
    rows,
    C: tl.constexpr,
    N: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """The gradients that act on value rows: dv, which is stored, and what the others are made of.

    Returns V, dy, u, dz as tiles of about 1, the powers of two they were divided by, and those of r
    and k. dz is the gradient of A_ak V + a^ S^T.
    """
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    square = n[:, None] * N + n[None, :]
    strict = t[:, None] > t[None, :]
    lower = t[:, None] >= t[None, :]
    log_decay, L, middle, rest = _log_decays(tl.load(w + tile, mask=rows, other=0.0), rows, C)
    grow = tl.exp(-L)
    r_raw = tl.load(r + tile, mask=rows, other=0.0)
    k_raw = tl.load(k + tile, mask=rows, other=0.0)
    r_power, r_shrink = power_below(r_raw)
    k_power, k_shrink = power_below(k_raw)
    k_out = k_raw * grow * k_shrink
    b_out = tl.load(b + tile, mask=rows, other=0.0) * grow
    a_out = tl.load(a + tile, mask=rows, other=0.0) * tl.exp(L - log_decay)
    r_in = narrow(r_raw * tl.exp(L) * r_shrink, WIDE)
    k_in = narrow(k_out, WIDE)
    A_ak = narrow(tl.where(strict, product(narrow(a_out, WIDE), tl.trans(k_in)), 0.0), FINE)
    A_rk = narrow(tl.where(lower, product(r_in, tl.trans(k_in)), 0.0), FINE)
    A_rb = product(r_in, tl.trans(narrow(b_out, WIDE)))
    A_rb = narrow(tl.where(lower, A_rb, 0.0), FINE)
    a_start = narrow(a_out * tl.exp(middle)[None, :], FINE)
    b_end = narrow(b_out * tl.exp(rest)[None, :], FINE)
    k_end = narrow(k_out * tl.exp(rest)[None, :], FINE)

    v_raw = tl.load(v + tile, mask=rows, other=0.0)
    v_power, v_shrink = power_below(v_raw)
    values = narrow(v_raw * v_shrink, FINE)
    X = tl.load(inverse + t[:, None] * C + t[None, :], mask=strict, other=0.0)
    z = product(a_start, tl.trans(tl.load(states + square))) * S_power[None, :]
    z += product(A_ak, values) * (k_power * v_power)
    u_power, u_shrink = power_below(z)
    z *= u_shrink
    u = narrow(add_product(z, X, narrow(z, FINE)), FINE)

    y_raw = tl.load(grad_y + tile, mask=rows, other=0.0)
    y_power, y_shrink = power_below(y_raw)
    dy = narrow(y_raw * y_shrink, FINE)
    after = tl.trans(tl.load(grad_states + square))
    dz = product(b_end, after) * dS_power[None, :]
    dz += product(tl.trans(A_rb), dy) * (r_power * y_power)
    z_power, z_shrink = power_below(dz)
    dz *= z_shrink
    dz = narrow(add_product(dz, tl.trans(X), narrow(dz, FINE)), FINE)

    dvalues = product(k_end, after) * dS_power[None, :]
    dvalues += product(tl.trans(A_ak), dz) * z_power
    dvalues += product(tl.trans(A_rk), dy) * (r_power * y_power)
    tl.store(dv + tile, narrow(dvalues * k_power, WIDE), mask=rows)
    return values, dy, u, dz, r_power, k_power, v_power, y_power, u_power, z_power


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
    K: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """All gradients of one chunk, given the state before it and the gradient of the one after it.

    Where a factor meets itself in the sum for the decay (r dr, k dk, a da, b db), it is the same
    rounded operand that made both products, so that what must cancel there cancels. Gradients by
    column of the state are made K columns at a time, to fit into registers.
    """
    slot = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, left = slot_tokens(slot, owners, cu_seqlens, T, C)
    if left <= 0:
        return
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    rows = (t < left)[:, None]
    strict = t[:, None] > t[None, :]
    lower = t[:, None] >= t[None, :]
    first = (start * H + h) * N
    unit = slot.to(tl.int64) * H + h
    states += unit * N * N
    grad_states += unit * N * N
    inverse += unit * C * C
    S_power = power_of(tl.load(inverse + (3 + n // V) * C - 1))
    dS_power = tl.load(grad_powers + unit * (N // GRAD_V) + n // GRAD_V)
    values, dy, u, dz, r_power, k_power, v_power, y_power, u_power, z_power = _row_gradients(
        r + first,
        w + first,
        k + first,
        v + first,
        a + first,
        b + first,
        grad_y + first,
        states,
        grad_states,
        inverse,
        dv + first,
        S_power,
        dS_power,
        t[:, None] * (H * N) + n[None, :],
        rows,
        C,
        N,
        WIDE,
        FINE,
    )
    # The gradients of r and k stay divided by the power of r and k, like their operands.
    dA_rk = product(dy, tl.trans(values)) * (r_power * y_power * k_power * v_power)
    dA_rk = narrow(tl.where(lower, dA_rk, 0.0), WIDE)
    dA_rb = product(dy, tl.trans(u)) * (r_power * y_power * u_power)
    dA_rb = narrow(tl.where(lower, dA_rb, 0.0), WIDE)
    dA_ak = product(dz, tl.trans(values)) * (z_power * k_power * v_power)
    dA_ak = narrow(tl.where(strict, dA_ak, 0.0), WIDE)
    dA_ab = product(dz, tl.trans(u)) * (z_power * u_power)
    dA_ab = narrow(tl.where(strict, dA_ab, 0.0), WIDE)
    S_most = tl.max(S_power, axis=0)
    dS_most = tl.max(dS_power, axis=0)
    dy = narrow(dy * (S_power / S_most)[None, :], FINE)
    dz = narrow(dz * (S_power / S_most)[None, :], FINE)
    values = narrow(values * (dS_power / dS_most)[None, :], FINE)
    u = narrow(u * (dS_power / dS_most)[None, :], FINE)
    for column in tl.range(0, N, K, num_stages=1):
        columns = column + tl.arange(0, K)
        square = n[:, None] * N + columns[None, :]
        tile = t[:, None] * (H * N) + columns[None, :]
        raw = tl.load(w + first + tile, mask=rows, other=0.0)
        log_decay, L, middle, rest = _log_decays(raw, rows, C)
        scale_in = tl.exp(middle)[None, :]
        scale_out = tl.exp(rest)[None, :]
        grow = tl.exp(-L)
        r_out = tl.exp(L) / r_power
        a_out = tl.exp(L - log_decay)
        k_out = grow / k_power
        r_in = narrow(tl.load(r + first + tile, mask=rows, other=0.0) * r_out, WIDE)
        k_in = narrow(tl.load(k + first + tile, mask=rows, other=0.0) * k_out, WIDE)
        a_in = narrow(tl.load(a + first + tile, mask=rows, other=0.0) * a_out, WIDE)
        b_in = narrow(tl.load(b + first + tile, mask=rows, other=0.0) * grow, WIDE)
        S = tl.load(states + square)
        dS = tl.load(grad_states + square)
        end = S.to(tl.float32) * dS.to(tl.float32) * (S_power * dS_power)[:, None]
        end = tl.sum(end, axis=0)[None, :] * scale_in * scale_out

        grad = product(dy, S) * (scale_in * (r_power * y_power * S_most))
        grad = add_product(add_product(grad, dA_rk, k_in), dA_rb, b_in)
        tl.store(dr + first + tile, narrow(grad * r_out, WIDE), mask=rows)
        dL = r_in.to(tl.float32) * grad

        grad = product(dz, S) * (scale_in * (z_power * S_most))
        grad = add_product(add_product(grad, dA_ak, k_in), dA_ab, b_in)
        tl.store(da + first + tile, narrow(grad * a_out, WIDE), mask=rows)
        before = a_in.to(tl.float32) * grad
        dL += before

        grad = product(values, dS) * (scale_out * (k_power * v_power * dS_most))
        end += tl.sum(k_in.to(tl.float32) * grad, axis=0)[None, :]
        grad = add_product(add_product(grad, tl.trans(dA_rk), r_in), tl.trans(dA_ak), a_in)
        tl.store(dk + first + tile, narrow(grad * k_out, WIDE), mask=rows)
        dL -= k_in.to(tl.float32) * grad

        grad = product(u, dS) * (scale_out * (u_power * dS_most))
        end += tl.sum(b_in.to(tl.float32) * grad, axis=0)[None, :]
        grad = add_product(add_product(grad, tl.trans(dA_rb), r_in), tl.trans(dA_ab), a_in)
        tl.store(db + first + tile, narrow(grad * grow, WIDE), mask=rows)
        dL -= b_in.to(tl.float32) * grad

        dl = tl.cumsum(dL, axis=0, reverse=True) - before + end
        tl.store(dw + first + tile, narrow(dl * log_decay, WIDE), mask=rows)
