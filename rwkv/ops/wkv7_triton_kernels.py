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

from rwkv.ops.triton_chunks import add_product, narrow, product, sequence_slots, slot_tokens


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
    owners,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Everything of a chunk that needs no state: M, c, R, y0, L_C, and X with KEEP.

    X is stored without its unit diagonal; its first row, which is empty, holds L_C once more where
    it fits, so that backward need not keep one more tensor.
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

    log_decay, L, middle, rest = _log_decays(tl.load(w + tile, mask=rows, other=0.0), rows, C)
    scale_in = tl.exp(middle)
    scale_out = tl.exp(rest)
    grow = tl.exp(-L)
    k_in = narrow(tl.load(k + tile, mask=rows, other=0.0) * grow, OPERAND)
    b_in = narrow(tl.load(b + tile, mask=rows, other=0.0) * grow, OPERAND)
    a_out = tl.load(a + tile, mask=rows, other=0.0) * tl.exp(L - log_decay)
    a_in = narrow(a_out, OPERAND)
    r_out = tl.load(r + tile, mask=rows, other=0.0) * tl.exp(L)
    r_in = narrow(r_out, OPERAND)
    values = narrow(tl.load(v + tile, mask=rows, other=0.0), OPERAND)
    tl.store(decay + unit * N + n, middle + rest)

    strict = t[:, None] > t[None, :]
    lower = t[:, None] >= t[None, :]
    A_ab = tl.where(strict, product(a_in, tl.trans(b_in)), 0.0)
    X = narrow(_inverse_less_identity(A_ab, C, PRECISION), OPERAND)
    if KEEP:
        square = unit * C * C + t[:, None] * C + t[None, :]
        if C >= N:
            tl.store(inverse + square, X, mask=t[:, None] > 0)
            tl.store(inverse + unit * C * C + n, narrow(middle + rest, OPERAND))
        else:
            tl.store(inverse + square, X)

    Xa = narrow(add_product(a_out, X, a_in), OPERAND)
    M = product(tl.trans(Xa), b_in) * scale_in[:, None] * scale_out[None, :]
    square = unit * N * N + n[:, None] * N + n[None, :]
    tl.store(transition + square, narrow(M, OPERAND))

    A_rb = narrow(tl.where(lower, product(r_in, tl.trans(b_in)), 0.0), OPERAND)
    R = add_product(r_out, A_rb, Xa) * scale_in[None, :]
    tl.store(readout + unit * C * N + t[:, None] * N + n[None, :], narrow(R, OPERAND))

    A_ak = narrow(tl.where(strict, product(a_in, tl.trans(k_in)), 0.0), OPERAND)
    u = product(A_ak, values)
    u = narrow(add_product(u, X, narrow(u, OPERAND)), OPERAND)
    A_rk = narrow(tl.where(lower, product(r_in, tl.trans(k_in)), 0.0), OPERAND)
    y0 = add_product(product(A_rk, values), A_rb, u)
    tl.store(y + tile, narrow(y0, OPERAND), mask=rows)

    c = add_product(product(tl.trans(values), k_in), tl.trans(u), b_in) * scale_out[None, :]
    tl.store(drive + square, narrow(c, OPERAND))


@triton.jit
def _add_product_fine(total, x, y, dtype: tl.constexpr):
    """total + x @ y with x in float32: a bfloat16 y is multiplied by both halves of x."""
    high = narrow(x, dtype)
    total = add_product(total, high, y)
    if dtype == tl.bfloat16:
        total = add_product(total, narrow(x - high.to(tl.float32), dtype), y)
    return total


@triton.jit(do_not_specialize=["T", "H"])
def scan_kernel(
    initial,
    transition,
    drive,
    readout,
    decay,
    y,
    states,
    final,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    OPERAND: tl.constexpr,
    KEEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """S' = S diag(e^L_C) + S M + c from chunk to chunk for V value rows; y = y0 + R S^T."""
    blocks: tl.constexpr = N // V
    unit = tl.program_id(0) // blocks
    q = unit // H
    h = unit % H
    first = tl.program_id(0) % blocks * V
    begin, length, slot = sequence_slots(q, cu_seqlens, T, C)
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    row = first + tl.arange(0, V)
    ends = unit.to(tl.int64) * N * N + row[:, None] * N + n[None, :]
    S = tl.load(initial + ends)
    for i in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        one = (slot + i) * H + h
        M = tl.load(transition + one * N * N + n[:, None] * N + n[None, :])
        c = tl.load(drive + one * N * N + row[:, None] * N + n[None, :])
        R = tl.load(readout + one * C * N + t[None, :] * N + n[:, None])  # transposed
        keep = tl.exp(tl.load(decay + one * N + n))
        tokens = begin + i * C + t
        out = y + (tokens[None, :] * H + h) * N + row[:, None]
        rows = (t < length - i * C)[None, :]
        high = narrow(S, OPERAND)
        if KEEP:
            tl.store(states + one * N * N + row[:, None] * N + n[None, :], high)
        y0 = tl.load(out, mask=rows, other=0.0).to(tl.float32)
        tl.store(out, narrow(add_product(y0, high, narrow(R, OPERAND)), OPERAND), mask=rows)
        S = _add_product_fine(S * keep[None, :] + c.to(tl.float32), S, narrow(M, OPERAND), OPERAND)
    tl.store(final + ends, S)


@triton.jit(do_not_specialize=["T", "H"])
def reverse_scan_kernel(
    grad_final,
    transition,
    readout,
    decay,
    decay_stride,
    grad_y,
    grad_states,
    grad_initial,
    cu_seqlens,
    T,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    OPERAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dS = dS' diag(e^L_C) + dS' M^T + dy^T R, from the last chunk to the first, for V rows."""
    blocks: tl.constexpr = N // V
    unit = tl.program_id(0) // blocks
    q = unit // H
    h = unit % H
    first = tl.program_id(0) % blocks * V
    begin, length, slot = sequence_slots(q, cu_seqlens, T, C)
    t = tl.arange(0, C)
    n = tl.arange(0, N)
    row = first + tl.arange(0, V)
    ends = unit.to(tl.int64) * N * N + row[:, None] * N + n[None, :]
    dS = tl.load(grad_final + ends)
    chunks = tl.cdiv(length, C)
    for back in tl.range(0, chunks, num_stages=STAGES):
        i = chunks - 1 - back
        one = (slot + i) * H + h
        M = tl.load(transition + one * N * N + n[None, :] * N + n[:, None])  # transposed
        R = tl.load(readout + one * C * N + t[:, None] * N + n[None, :])
        keep = tl.exp(tl.load(decay + one * decay_stride + n).to(tl.float32))
        tokens = begin + i * C + t
        rows = (t < length - i * C)[None, :]
        dy = tl.load(grad_y + (tokens[None, :] * H + h) * N + row[:, None], mask=rows, other=0.0)
        tl.store(grad_states + one * N * N + row[:, None] * N + n[None, :], narrow(dS, OPERAND))
        read = product(narrow(dy, OPERAND), narrow(R, OPERAND))
        dS = _add_product_fine(dS * keep[None, :] + read, dS, narrow(M, OPERAND), OPERAND)
    tl.store(grad_initial + ends, dS)


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
    OPERAND: tl.constexpr,
):
    """All gradients of one chunk, given the state before it and the gradient of the one after it.

    Where a factor meets itself in the sum for the decay (r dr, k dk, a da, b db), it is the same
    rounded operand that made both products, so that what must cancel there cancels.
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
    square = unit * N * N + n[:, None] * N + n[None, :]

    log_decay, L, middle, rest = _log_decays(tl.load(w + tile, mask=rows, other=0.0), rows, C)
    scale_in = tl.exp(middle)[None, :]
    scale_out = tl.exp(rest)[None, :]
    grow = tl.exp(-L)
    k_out = tl.load(k + tile, mask=rows, other=0.0) * grow
    b_out = tl.load(b + tile, mask=rows, other=0.0) * grow
    a_out = tl.load(a + tile, mask=rows, other=0.0) * tl.exp(L - log_decay)
    r_in = narrow(tl.load(r + tile, mask=rows, other=0.0) * tl.exp(L), OPERAND)
    k_in = narrow(k_out, OPERAND)
    b_in = narrow(b_out, OPERAND)
    a_in = narrow(a_out, OPERAND)
    values = narrow(tl.load(v + tile, mask=rows, other=0.0), OPERAND)
    dy = narrow(tl.load(grad_y + tile, mask=rows, other=0.0), OPERAND)
    S = narrow(tl.load(states + square), OPERAND)
    dS = narrow(tl.load(grad_states + square), OPERAND)
    X = inverse + unit * C * C + t[:, None] * C + t[None, :]
    X = narrow(tl.load(X, mask=t[:, None] > 0, other=0.0), OPERAND)

    strict = t[:, None] > t[None, :]
    lower = t[:, None] >= t[None, :]
    A = narrow(tl.where(strict, product(a_in, tl.trans(k_in)), 0.0), OPERAND)
    z = add_product(product(A, values), narrow(a_out * scale_in, OPERAND), tl.trans(S))
    u = narrow(add_product(z, X, narrow(z, OPERAND)), OPERAND)

    A_rb = narrow(tl.where(lower, product(r_in, tl.trans(b_in)), 0.0), OPERAND)
    du = product(narrow(b_out * scale_out, OPERAND), tl.trans(dS))
    du = add_product(du, tl.trans(A_rb), dy)
    dz = narrow(add_product(du, tl.trans(X), narrow(du, OPERAND)), OPERAND)

    dvalues = product(narrow(k_out * scale_out, OPERAND), tl.trans(dS))
    dvalues = add_product(dvalues, tl.trans(A), dz)
    A_rk = narrow(tl.where(lower, product(r_in, tl.trans(k_in)), 0.0), OPERAND)
    dvalues = add_product(dvalues, tl.trans(A_rk), dy)
    tl.store(dv + tile, narrow(dvalues, OPERAND), mask=rows)

    dA_rk = narrow(tl.where(lower, product(dy, tl.trans(values)), 0.0), OPERAND)
    dA_rb = narrow(tl.where(lower, product(dy, tl.trans(u)), 0.0), OPERAND)
    grad = product(dy, S) * scale_in
    grad = add_product(add_product(grad, dA_rk, k_in), dA_rb, b_in)
    tl.store(dr + tile, narrow(grad * tl.exp(L), OPERAND), mask=rows)
    dL = r_in.to(tl.float32) * grad

    dA_ak = narrow(tl.where(strict, product(dz, tl.trans(values)), 0.0), OPERAND)
    dA_ab = narrow(tl.where(strict, product(dz, tl.trans(u)), 0.0), OPERAND)
    grad = product(dz, S) * scale_in
    grad = add_product(add_product(grad, dA_ak, k_in), dA_ab, b_in)
    tl.store(da + tile, narrow(grad * tl.exp(L - log_decay), OPERAND), mask=rows)
    before = a_in.to(tl.float32) * grad
    dL += before

    grad = product(values, dS) * scale_out
    end = tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=0)[None, :] * scale_in * scale_out
    end += tl.sum(k_in.to(tl.float32) * grad, axis=0)[None, :]
    grad = add_product(add_product(grad, tl.trans(dA_rk), r_in), tl.trans(dA_ak), a_in)
    tl.store(dk + tile, narrow(grad * grow, OPERAND), mask=rows)
    dL -= k_in.to(tl.float32) * grad

    grad = product(u, dS) * scale_out
    end += tl.sum(b_in.to(tl.float32) * grad, axis=0)[None, :]
    grad = add_product(add_product(grad, tl.trans(dA_rb), r_in), tl.trans(dA_ab), a_in)
    tl.store(db + tile, narrow(grad * grow, OPERAND), mask=rows)
    dL -= b_in.to(tl.float32) * grad

    dl = tl.cumsum(dL, axis=0, reverse=True) - before + end
    tl.store(dw + tile, narrow(dl * log_decay, OPERAND), mask=rows)
