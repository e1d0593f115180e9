"""One token of each row in Triton; see rwkv/ops/decoding.py.

The state is the bulk of what a step moves: one program reads a head of a row, 16 KiB at N = 64,
changes it and writes it back, and does all that belongs to the head on the way. Everything is
computed in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from rwkv.ops.picking_triton import pick as pick  # functions that a backend offers
from rwkv.ops.picking_triton import uniform_numbers as uniform_numbers

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
    return None


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
    centred = tl.where(inside, x - tl.sum(x, 0) / C, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + i, mask=inside, other=0.0).to(tl.float32)
    normed = centred * scale * weight + bias
    before = tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32) - normed
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
def _normed_head(y, weight_ptr, bias_ptr, channel, eps, N: tl.constexpr):
    centred = y - tl.sum(y, 0) / N
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / N + eps)
    weight = tl.load(weight_ptr + channel).to(tl.float32)
    return centred * scale * weight + tl.load(bias_ptr + channel).to(tl.float32)


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
    y_ptr,
    H,
    eps,
    BLEND: tl.constexpr,
    N: tl.constexpr,
):
    """A program a head of a row: grid (B H)."""
    n = tl.arange(0, N)
    program = tl.program_id(0).to(tl.int64)
    channel = (program % H) * N + n
    at = program * N + n
    place = state_ptr + program * N * N + n[:, None] * N + n[None, :]
    S = tl.load(place)  # values on rows, keys on columns

    r = tl.load(r_ptr + at).to(tl.float32)
    k = tl.load(k_ptr + at).to(tl.float32)
    v = tl.load(v_ptr + at).to(tl.float32)
    w = tl.load(w0_ptr + channel).to(tl.float32) + tl.load(decay_ptr + at).to(tl.float32)
    kept = tl.exp(-0.6065306597126334 * tl.sigmoid(w))  # exp(-0.5)
    iclr = tl.load(a0_ptr + channel).to(tl.float32) + tl.load(iclr_ptr + at).to(tl.float32)
    iclr = tl.sigmoid(iclr)
    if BLEND:
        share = tl.load(v0_ptr + channel).to(tl.float32) + tl.load(blend_ptr + at).to(tl.float32)
        v += (tl.load(first_ptr + at).to(tl.float32) - v) * tl.sigmoid(share)
    kk = k * tl.load(k_k_ptr + channel).to(tl.float32)
    kk = kk / tl.maximum(tl.sqrt(tl.sum(kk * kk, 0)), 1e-12)
    k = k * (1.0 + (iclr - 1.0) * tl.load(k_a_ptr + channel).to(tl.float32))

    removed = tl.sum(S * kk[None, :], 1)
    S = S * kept[None, :] - removed[:, None] * (kk * iclr)[None, :] + v[:, None] * k[None, :]
    tl.store(place, S)
    y = _normed_head(tl.sum(S * r[None, :], 1), weight_ptr, bias_ptr, channel, eps, N)
    y += tl.sum(r * k * tl.load(r_k_ptr + channel).to(tl.float32), 0) * v
    y *= tl.load(gate_ptr + at).to(tl.float32)
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
    y_ptr,
    H,
    eps,
    N: tl.constexpr,
):
    """A program a head of a row: grid (B H)."""
    n = tl.arange(0, N)
    program = tl.program_id(0).to(tl.int64)
    channel = (program % H) * N + n
    at = program * N + n
    place = state_ptr + program * N * N + n[:, None] * N + n[None, :]
    S = tl.load(place)  # values on rows, keys on columns

    r = tl.load(r_ptr + at).to(tl.float32)
    k = tl.load(k_ptr + at).to(tl.float32)
    v = tl.load(v_ptr + at).to(tl.float32)
    w = tl.load(w0_ptr + channel).to(tl.float32) + tl.load(decay_ptr + at).to(tl.float32)
    kept = tl.exp(-tl.exp(w))
    bonus = tl.sum(tl.load(u_ptr + channel).to(tl.float32) * k * r, 0)
    y = tl.sum(S * r[None, :], 1) + v * bonus
    tl.store(place, S * kept[None, :] + v[:, None] * k[None, :])
    gate = tl.load(gate_ptr + at).to(tl.float32)
    y = _normed_head(y, weight_ptr, bias_ptr, channel, eps, N) * gate * tl.sigmoid(gate)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))


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
) -> Tensor:
    B, H, N, _ = wkv.shape
    q, norm = dict(att.named_parameters(recurse=False)), att.get_submodule("ln_x")
    assert isinstance(norm, nn.GroupNorm)
    y = torch.empty_like(r)
    _wkv7_kernel[(B * H,)](
        r, k, v, decay, iclr, r if blend is None else blend, gate,
        r if v_first is None else v_first,
        q["w0"], q["a0"], q.get("v0", q["a0"]), q["k_k"], q["k_a"], q["r_k"],
        norm.weight, norm.bias, wkv, y, H, norm.eps,
        BLEND=blend is not None, N=N, num_warps=4 if N <= 64 else 8,
    )  # fmt: skip
    return y


def wkv6_step(
    att: nn.Module, r: Tensor, k: Tensor, v: Tensor, decay: Tensor, gate: Tensor, wkv: Tensor
) -> Tensor:
    B, H, N, _ = wkv.shape
    q, norm = dict(att.named_parameters(recurse=False)), att.get_submodule("ln_x")
    assert isinstance(norm, nn.GroupNorm)
    y = torch.empty_like(r)
    _wkv6_kernel[(B * H,)](
        r, k, v, decay, gate, q["time_decay"], q["time_faaaa"],
        norm.weight, norm.bias, wkv, y, H, norm.eps,
        N=N, num_warps=4 if N <= 64 else 8,
    )  # fmt: skip
    return y


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
