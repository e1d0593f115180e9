"""One token of each row in Triton; see rwkv/ops/decoding.py.

The state is the bulk of what a step moves: one program reads a head of a row, 16 KiB at N = 64,
changes it and writes it back, and does all that belongs to the head on the way. With `late` it
writes only what changes the state, and at every fourth step the state itself. Everything is
computed in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from rwkv.ops import cuda_build, picking_triton
from rwkv.ops.decoding import Late
from rwkv.ops.picking_triton import pick as pick  # functions that a backend offers
from rwkv.ops.picking_triton import uniform_numbers as uniform_numbers

LATE = 3  # changes of a state that may be missing from it; a fourth writes it
WARPS = 2  # of a head of 64 channels, where there are many
INTERPRETED = bool(triton.knobs.runtime.interpret)
MIXES = 6  # of one mix_shift at most


def why_not(sample: Tensor, packed: bool) -> str | None:
    N = sample.shape[-1]
    if sample.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"computes in float32, the tensors are {sample.dtype}"
    if N & (N - 1) or N > 128:
        return f"needs heads of 2^n channels up to 128, not {N}"
    if sample.device.type != "cuda" and not INTERPRETED:
        return f"needs a GPU, the tensors are on {sample.device}"
    return cuda_build.too_small(sample.device, picking_triton.SHARED)


@triton.jit
def _mix_shift_kernel(
    x_ptr,
    added_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    mix0,
    mix1,
    mix2,
    mix3,
    mix4,
    mix5,
    out_ptr,
    normed_ptr,
    before_ptr,
    total,
    C,
    eps,
    ADDED: tl.constexpr,
    M: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a row; `total` is B C, the distance between two outputs."""
    i = tl.arange(0, BLOCK)
    inside = i < C
    at = tl.program_id(0).to(tl.int64) * C + i
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(added_ptr + at, mask=inside, other=0.0).to(tl.float32)
        stored = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, stored, mask=inside)
        x = stored.to(tl.float32)
    # Read before the sums, which threads wait for.
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + i, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + at, mask=inside, other=0.0)
    centred = tl.where(inside, x - tl.sum(x, 0) / C, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    normed = centred * scale * weight.to(tl.float32) + bias.to(tl.float32)
    before = shift.to(tl.float32) - normed
    tl.store(shift_ptr + at, normed.to(shift_ptr.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)
        tl.store(before_ptr + at, before.to(before_ptr.dtype.element_ty), mask=inside)
    for m in tl.static_range(M):
        if m == 0:
            mix_ptr = mix0
        elif m == 1:
            mix_ptr = mix1
        elif m == 2:
            mix_ptr = mix2
        elif m == 3:
            mix_ptr = mix3
        elif m == 4:
            mix_ptr = mix4
        else:
            mix_ptr = mix5
        mix = tl.load(mix_ptr + i, mask=inside, other=0.0).to(tl.float32)
        out = (normed + before * mix).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m * total + at, out, mask=inside)


@triton.jit
def _mix_apart_kernel(
    normed_ptr,
    before_ptr,
    delta_ptr,
    mix0,
    mix1,
    mix2,
    mix3,
    mix4,
    out_ptr,
    total,
    C,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a row."""
    i = tl.arange(0, BLOCK)
    inside = i < C
    at = tl.program_id(0).to(tl.int64) * C + i
    normed = tl.load(normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(before_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        if m == 0:
            mix_ptr = mix0
        elif m == 1:
            mix_ptr = mix1
        elif m == 2:
            mix_ptr = mix2
        elif m == 3:
            mix_ptr = mix3
        else:
            mix_ptr = mix4
        place = m * total + at
        mix = tl.load(mix_ptr + i, mask=inside, other=0.0).to(tl.float32)
        mix += tl.load(delta_ptr + place, mask=inside, other=0.0).to(tl.float32)
        out = (normed + before * mix).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, out, mask=inside)


@triton.jit
def _normed_head(y, weight, bias, eps, N: tl.constexpr):
    centred = y - tl.sum(y, 0) / N
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / N + eps)
    return centred * scale * weight.to(tl.float32) + bias.to(tl.float32)


@triton.jit
def _change7(k, decay, iclr, w0, a0, k_k, k_a):
    """A head's share kept, removal key, what it adds to, and key, [N]; of what wkv7_step is given.

    The state becomes S diag(kept) - (S kk) replaced^T + v k^T.
    """
    k = k.to(tl.float32)
    kept = tl.exp(-0.6065306597126334 * tl.sigmoid(w0 + decay.to(tl.float32)))  # exp(-0.5)
    iclr = tl.sigmoid(a0 + iclr.to(tl.float32))
    kk = k * k_k
    kk = kk / tl.maximum(tl.sqrt(tl.sum(kk * kk, 0)), 1e-12)
    return kept, kk, kk * iclr, k * (1.0 + (iclr - 1.0) * k_a)


@triton.jit
def _wkv7_kernel(
    r_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    iclr_ptr,
    blend_ptr,
    gate_ptr,
    first_ptr,
    w0_ptr,
    a0_ptr,
    v0_ptr,
    k_k_ptr,
    k_a_ptr,
    r_k_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    late_ptr,
    values_ptr,
    noted_ptr,
    y_ptr,
    total,
    H,
    eps,
    BLEND: tl.constexpr,
    LATE: tl.constexpr,
    N: tl.constexpr,
):
    """A program a head of a row: grid (B H). `total` is B H N."""
    n = tl.arange(0, N)
    program = tl.program_id(0).to(tl.int64)
    channel = (program % H) * N + n
    at = program * N + n
    place = state_ptr + program * N * N + n[:, None] * N + n[None, :]
    S = tl.load(place)  # values on rows, keys on columns

    r = tl.load(r_ptr + at).to(tl.float32)
    k = tl.load(k_ptr + at)
    decay = tl.load(decay_ptr + at)
    iclr = tl.load(iclr_ptr + at)
    v = tl.load(v_ptr + at).to(tl.float32)
    gate = tl.load(gate_ptr + at).to(tl.float32)
    w0 = tl.load(w0_ptr + channel).to(tl.float32)
    a0 = tl.load(a0_ptr + channel).to(tl.float32)
    k_k = tl.load(k_k_ptr + channel).to(tl.float32)
    k_a = tl.load(k_a_ptr + channel).to(tl.float32)
    r_k = tl.load(r_k_ptr + channel).to(tl.float32)
    weight = tl.load(weight_ptr + channel)
    bias = tl.load(bias_ptr + channel)
    if BLEND:
        share = tl.load(v0_ptr + channel).to(tl.float32) + tl.load(blend_ptr + at).to(tl.float32)
        v += (tl.load(first_ptr + at).to(tl.float32) - v) * tl.sigmoid(share)

    if LATE:
        noted = tl.load(noted_ptr).to(tl.int32)
        for j in range(noted):
            then = late_ptr + j * 3 * total + at
            kept, kk, replaced, key = _change7(
                tl.load(then + total),
                tl.load(then),
                tl.load(then + 2 * total),
                w0, a0, k_k, k_a,
            )  # fmt: skip
            value = tl.load(values_ptr + j * total + at)
            removed = tl.sum(S * kk[None, :], 1)
            S = S * kept[None, :] - removed[:, None] * replaced[None, :]
            S += value[:, None] * key[None, :]
    kept, kk, replaced, key = _change7(k, decay, iclr, w0, a0, k_k, k_a)
    removed = tl.sum(S * kk[None, :], 1)
    S = S * kept[None, :] - removed[:, None] * replaced[None, :]
    S += v[:, None] * key[None, :]
    if LATE:
        if noted < LATE:
            then = late_ptr + noted * 3 * total + at
            tl.store(then, decay)
            tl.store(then + total, k)
            tl.store(then + 2 * total, iclr)
            tl.store(values_ptr + noted * total + at, v)
        else:
            tl.store(place, S)
    else:
        tl.store(place, S)
    y = _normed_head(tl.sum(S * r[None, :], 1), weight, bias, eps, N)
    y += tl.sum(r * key * r_k, 0) * v
    y *= gate
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))


@triton.jit
def _wkv6_kernel(
    r_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    gate_ptr,
    w0_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    late_ptr,
    values_ptr,
    noted_ptr,
    y_ptr,
    total,
    H,
    eps,
    LATE: tl.constexpr,
    N: tl.constexpr,
):
    """A program a head of a row: grid (B H). `total` is B H N."""
    n = tl.arange(0, N)
    program = tl.program_id(0).to(tl.int64)
    channel = (program % H) * N + n
    at = program * N + n
    place = state_ptr + program * N * N + n[:, None] * N + n[None, :]
    S = tl.load(place)  # values on rows, keys on columns

    r = tl.load(r_ptr + at).to(tl.float32)
    k = tl.load(k_ptr + at)
    decay = tl.load(decay_ptr + at)
    v = tl.load(v_ptr + at).to(tl.float32)
    gate = tl.load(gate_ptr + at).to(tl.float32)
    w0 = tl.load(w0_ptr + channel).to(tl.float32)
    u = tl.load(u_ptr + channel).to(tl.float32)
    weight = tl.load(weight_ptr + channel)
    bias = tl.load(bias_ptr + channel)
    if LATE:
        noted = tl.load(noted_ptr).to(tl.int32)
        for j in range(noted):
            then = late_ptr + j * 2 * total + at
            kept = tl.exp(-tl.exp(w0 + tl.load(then).to(tl.float32)))
            key = tl.load(then + total).to(tl.float32)
            value = tl.load(values_ptr + j * total + at)
            S = S * kept[None, :] + value[:, None] * key[None, :]
    key = k.to(tl.float32)
    y = tl.sum(S * r[None, :], 1) + v * tl.sum(u * key * r, 0)
    if LATE:
        if noted < LATE:
            then = late_ptr + noted * 2 * total + at
            tl.store(then, decay)
            tl.store(then + total, k)
            tl.store(values_ptr + noted * total + at, v)
        else:
            kept = tl.exp(-tl.exp(w0 + decay.to(tl.float32)))
            tl.store(place, S * kept[None, :] + v[:, None] * key[None, :])
    else:
        kept = tl.exp(-tl.exp(w0 + decay.to(tl.float32)))
        tl.store(place, S * kept[None, :] + v[:, None] * key[None, :])
    y = _normed_head(y, weight, bias, eps, N) * gate * tl.sigmoid(gate)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))


@triton.jit
def _before(tile, n0, n1, n2, R0, R1, R2):
    """What lies before the product to which a tile belongs; n are where the others begin."""
    return tl.where(tile < n0, 0, R0) + tl.where(tile < n1, 0, R1) + tl.where(tile < n2, 0, R2)


@triton.jit
def _down_kernel(
    x0,
    x1,
    x2,
    x3,
    weight0,
    weight1,
    weight2,
    weight3,
    out_ptr,
    B,
    C,
    R0,
    R1,
    R2,
    R3,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Low-rank products' first halves side by side: tanh, itself, itself, sigmoid of x weight.

    Grid (blocks of columns, each within one product; blocks of rows); weights [C, R], out [B, sum].
    """
    tile = tl.program_id(0)
    n0 = tl.cdiv(R0, COLUMNS)
    n1 = n0 + tl.cdiv(R1, COLUMNS)
    n2 = n1 + tl.cdiv(R2, COLUMNS)
    if tile < n0:
        x_ptr, weight_ptr = x0, weight0
    elif tile < n1:
        x_ptr, weight_ptr = x1, weight1
    elif tile < n2:
        x_ptr, weight_ptr = x2, weight2
    else:
        x_ptr, weight_ptr = x3, weight3
    R = tl.where(tile < n0, R0, tl.where(tile < n1, R1, tl.where(tile < n2, R2, R3)))
    before = _before(tile, n0, n1, n2, R0, R1, R2)
    block = tile - _before(tile, n0, n1, n2, n0, n1 - n0, n2 - n1)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.arange(0, STEP)
    x_ptr += row.to(tl.int64)[:, None] * C
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, C, STEP):
        at = start + c
        x = tl.load(x_ptr + at[None, :], mask=(row < B)[:, None] & (at < C)[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + at[:, None] * R + column[None, :],
            mask=(at < C)[:, None] & (column < R)[None, :],
            other=0.0,
        )
        total = tl.dot(x, weight, total, input_precision="ieee")
    if tile < n0:
        total = 2.0 * tl.sigmoid(2.0 * total) - 1.0
    elif tile >= n2:
        total = tl.sigmoid(total)
    place = out_ptr + row.to(tl.int64)[:, None] * (R0 + R1 + R2 + R3) + before + column[None, :]
    inside = (row < B)[:, None] & (column < R)[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _up_kernel(
    low_ptr,
    weight0,
    weight1,
    weight2,
    weight3,
    out_ptr,
    B,
    A,
    R0,
    R1,
    R2,
    R3,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Their second halves: grid (blocks of columns, blocks of rows, products); out [4, B, A]."""
    product = tl.program_id(2)
    if product == 0:
        weight_ptr = weight0
    elif product == 1:
        weight_ptr = weight1
    elif product == 2:
        weight_ptr = weight2
    else:
        weight_ptr = weight3
    R = tl.where(product < 1, R0, tl.where(product < 2, R1, tl.where(product < 3, R2, R3)))
    before = _before(product, 1, 2, 3, R0, R1, R2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    low_ptr += row.to(tl.int64)[:, None] * (R0 + R1 + R2 + R3) + before
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, R, STEP):
        k = start + tl.arange(0, STEP)
        low = tl.load(low_ptr + k[None, :], mask=(row < B)[:, None] & (k < R)[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + k[:, None] * A + column[None, :],
            mask=(k < R)[:, None] & (column < A)[None, :],
            other=0.0,
        )
        total = tl.dot(low, weight, total, input_precision="ieee")
    place = out_ptr + (product * B + row).to(tl.int64)[:, None] * A + column[None, :]
    inside = (row < B)[:, None] & (column < A)[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _square_relu_kernel(x_ptr, total, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.maximum(tl.load(x_ptr + i, mask=i < total, other=0.0).to(tl.float32), 0.0)
    tl.store(x_ptr + i, (x * x).to(x_ptr.dtype.element_ty), mask=i < total)


def mix_shift(
    x: Tensor, added: Tensor | None, norm: nn.LayerNorm, shift: Tensor, mixes: list[Tensor]
) -> list[Tensor]:
    return _mix_shift(x, added, norm, shift, mixes, keep=False)[0]


def mix_shift6(
    x: Tensor, added: Tensor | None, norm: nn.LayerNorm, shift: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (mixed,), normed, before = _mix_shift(x, added, norm, shift, [mix], keep=True)
    return mixed, normed, before


def mix_apart(n: Tensor, before: Tensor, mixes: list[Tensor], deltas: Tensor) -> list[Tensor]:
    (B, C), M = n.shape, len(mixes)
    assert M < MIXES
    out = n.new_empty(M, B, C)
    pointers = [*mixes, *[mixes[0]] * (MIXES - 1 - M)]
    block = triton.next_power_of_2(C)
    _mix_apart_kernel[(B,)](
        n, before, deltas.contiguous(), *pointers, out, B * C, C,
        M=M, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return list(out)


def low_rank7(
    att: nn.Module, x_w: Tensor, x_a: Tensor, x_v: Tensor, x_g: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    q = dict(att.named_parameters(recurse=False))
    blends = "v1" in q  # in layer 0 a product of rank 0 stands there
    letters = ("w", "a", "v" if blends else "a", "g")
    first, second = ([q[f"{letter}{half}"] for letter in letters] for half in (1, 2))
    ranks = [weight.shape[1] for weight in first]
    ranks[2] *= blends
    (B, C), A = x_w.shape, second[0].shape[1]
    low, out = x_w.new_empty(B, sum(ranks)), x_w.new_empty(4, B, A)
    few = B <= 32
    down = {
        "ROWS": 16 if few else 64,
        "COLUMNS": 16 if few else 32,
        "STEP": 256 // x_w.element_size(),
    }
    blocks = sum(triton.cdiv(rank, down["COLUMNS"]) for rank in ranks)
    _down_kernel[(blocks, triton.cdiv(B, down["ROWS"]))](
        x_w,
        x_a,
        x_v,
        x_g,
        *first,
        low,
        B,
        C,
        *ranks,
        **down,
        num_warps=4,
        num_stages=5 if few else 3,
    )
    up = {"ROWS": 16 if few else 64, "COLUMNS": 64 if few else 128, "STEP": 32}
    _up_kernel[(triton.cdiv(A, up["COLUMNS"]), triton.cdiv(B, up["ROWS"]), 4)](
        low, *second, out, B, A, *ranks, **up, num_warps=4, num_stages=3
    )
    decay, iclr, blend, gate = out
    return decay, iclr, blend if blends else None, gate


def wkv7_step(
    att: nn.Module,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    iclr: Tensor,
    blend: Tensor | None,
    gate: Tensor,
    v_first: Tensor | None,
    wkv: Tensor,
    late: Late | None,
) -> Tensor:
    B, H, N, _ = wkv.shape
    q, norm = dict(att.named_parameters(recurse=False)), att.get_submodule("ln_x")
    assert isinstance(norm, nn.GroupNorm)
    y = torch.empty_like(r)
    _wkv7_kernel[(B * H,)](
        r, k, v, decay, iclr, r if blend is None else blend, gate,
        r if v_first is None else v_first,
        q["w0"], q["a0"], q.get("v0", q["a0"]), q["k_k"], q["k_a"], q["r_k"],
        norm.weight, norm.bias, wkv, *_late_arguments(late, wkv), y, B * H * N, H, norm.eps,
        BLEND=blend is not None, LATE=0 if late is None else len(late.inputs), N=N,
        num_warps=_head_warps(B * H, N),
    )  # fmt: skip
    return y


def wkv6_step(
    att: nn.Module,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    gate: Tensor,
    wkv: Tensor,
    late: Late | None,
) -> Tensor:
    B, H, N, _ = wkv.shape
    q, norm = dict(att.named_parameters(recurse=False)), att.get_submodule("ln_x")
    assert isinstance(norm, nn.GroupNorm)
    y = torch.empty_like(r)
    _wkv6_kernel[(B * H,)](
        r, k, v, decay, gate, q["time_decay"], q["time_faaaa"],
        norm.weight, norm.bias, wkv, *_late_arguments(late, wkv), y, B * H * N, H, norm.eps,
        LATE=0 if late is None else len(late.inputs), N=N, num_warps=_head_warps(B * H, N),
    )  # fmt: skip
    return y


def _head_warps(heads: int, N: int) -> int:
    """Many heads need few threads each: they wait less for each other and leave room for more."""
    few = WARPS if heads >= 1024 else 4
    return few if N <= 64 else 2 * few


def _late_arguments(late: Late | None, wkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (wkv, wkv, wkv) if late is None else (late.inputs, late.values, late.noted)


def square_relu(x: Tensor) -> Tensor:
    total = x.numel()
    _square_relu_kernel[(triton.cdiv(total, 2048),)](x, total, BLOCK=2048)
    return x


def _mix_shift(
    x: Tensor,
    added: Tensor | None,
    norm: nn.LayerNorm,
    shift: Tensor,
    mixes: list[Tensor],
    *,
    keep: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    (B, C), M = x.shape, len(mixes)
    assert 0 < M <= MIXES
    out = x.new_empty(M, B, C)
    normed, before = (torch.empty_like(x), torch.empty_like(x)) if keep else (x, x)
    pointers = [*mixes, *[mixes[0]] * (MIXES - M)]
    block = triton.next_power_of_2(C)
    _mix_shift_kernel[(B,)](
        x, x if added is None else added, norm.weight, norm.bias, shift, *pointers,
        out, normed, before, B * C, C, norm.eps,
        ADDED=added is not None, M=M, KEEP=keep, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return list(out), normed, before


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))
