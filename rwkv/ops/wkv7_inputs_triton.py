"""wkv7_inputs in Triton: one kernel forward, one backward, each reading and writing all once.

r, v and v_first pass through: the gradients that meet in them are added in the backward kernel,
where each would otherwise take a pass of its own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv.ops.fused import flags, sums_of_programs
from rwkv.ops.heads_triton import head_grid, head_tile, read, write


def wkv7_inputs(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    v_first: Tensor | None,
    decay: Tensor,
    iclr: Tensor,
    value: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    """The fields of Wkv7Inputs, of arguments in the order of `wkv7_inputs.wkv7_inputs`."""
    tensors = (
        None if x is None else x.contiguous() for x in (r, k, v, v_first, decay, iclr, value)
    )
    return _Wkv7Inputs.apply(*tensors, *parameters)


class _Wkv7Inputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        v_first: Tensor | None,
        decay: Tensor,
        iclr: Tensor,
        value: Tensor | None,
        w0: Tensor,
        a0: Tensor,
        v0: Tensor | None,
        k_k: Tensor,
        k_a: Tensor,
        r_k: Tensor,
    ) -> tuple[Tensor, ...]:
        B, T, _ = k.shape
        H, N = r_k.shape
        heads = (B, T, H, N)
        w, key, a, b = (k.new_empty(heads) for _ in range(4))
        mixed = None if v_first is None else k.new_empty(heads)
        bonus = k.new_empty(B, T, H, dtype=torch.float32)
        grid, sizes = head_grid(B * T, H, N, k.device, programs=64, most=16)
        with torch.cuda.device_of(k):
            _forward_kernel[grid](
                *(r, k, v, v_first, decay, iclr, value, w0, a0, v0, k_k, k_a, r_k),
                *(w, key, mixed, a, b, bonus, B * T),
                **sizes,
                num_warps=1,
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(r, k, v, v_first, decay, iclr, value, w0, a0, v0, k_k, k_a, r_k)
        if mixed is None:
            mixed, v_first = v.detach().view(heads), v
        assert v_first is not None
        r = r.detach().view(heads)
        return r, w, key, mixed, a, b, bonus, mixed.detach(), v_first.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        saved = ctx.saved_tensors
        r, k, v, v_first, decay, iclr, value, *parameters = saved
        B, T, _ = k.shape
        H, N = parameters[-1].shape
        need, wanted = ctx.needs_input_grad[:7], ctx.needs_input_grad[7:]
        given = tuple(None if grad is None else grad.contiguous() for grad in grads)
        results = [
            torch.empty_like(x) if needed else None for x, needed in zip(saved, need, strict=False)
        ]
        sums = sum(wanted)
        grid, sizes = head_grid(
            B * T, H, N, k.device, programs=8 if sums else 64, most=None if sums else 32
        )
        partial = k.new_empty(grid[0], sums, H * N, dtype=torch.float32)
        with torch.cuda.device_of(k):
            _backward_kernel[grid](
                *saved,
                *(given, tuple(results), partial, B * T),
                **sizes,
                WANTED=flags(wanted),
                SUMS=sums,
                STAGES=2,  # a row's 15 tensors are loaded while the one before is worked on
                num_warps=1,
            )
        return *results, *sums_of_programs(partial, parameters, wanted)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _length(u):
    """The norm of each head [HEADS, N] as F.normalize divides by it, [HEADS, 1]."""
    return tl.maximum(tl.sqrt(tl.sum(u * u, axis=1)), 1e-12)[:, None]


@triton.jit(do_not_specialize=["rows", "count"])
def _forward_kernel(
    r,
    k,
    v,
    v_first,
    decay,
    iclr,
    value,
    w0,
    a0,
    v0,
    k_k,
    k_a,
    r_k,
    w,
    key,
    mixed,
    a,
    b,
    bonus,
    rows,
    count,
    H: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
):
    channels, inside, h = head_tile(H, N, HEADS)
    w0_ = read(w0, channels, inside)
    a0_ = read(a0, channels, inside)
    v0_ = read(v0, channels, inside)
    k_k_ = read(k_k, channels, inside)
    k_a_ = read(k_a, channels, inside)
    r_k_ = read(r_k, channels, inside)
    first = tl.program_id(0) * count
    for step in range(0, tl.minimum(count, rows - first)):
        row = first + step
        at = row.to(tl.int64) * (H * N) + channels
        k_ = read(k, at, inside)
        r_ = read(r, at, inside)
        decay_ = read(decay, at, inside) + w0_
        rate = tl.sigmoid(read(iclr, at, inside) + a0_)
        u = k_ * k_k_
        kk = u / _length(u)
        key_ = k_ * (1.0 + (rate - 1.0) * k_a_)
        write(w, at, -_softplus(-decay_) - 0.5, inside)
        write(key, at, key_, inside)
        write(a, at, -kk, inside)
        write(b, at, kk * rate, inside)
        if v_first is not None:
            v_ = read(v, at, inside)
            share = tl.sigmoid(read(value, at, inside) + v0_)
            write(mixed, at, v_ + (read(v_first, at, inside) - v_) * share, inside)
        total = tl.sum(r_ * key_ * r_k_, axis=1)
        tl.store(bonus + row.to(tl.int64) * H + h, total, mask=h < H)


@triton.jit(do_not_specialize=["rows", "count"])
def _backward_kernel(
    r,
    k,
    v,
    v_first,
    decay,
    iclr,
    value,
    w0,
    a0,
    v0,
    k_k,
    k_a,
    r_k,
    given,
    results,
    partial,
    rows,
    count,
    H: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    WANTED: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`given`: gradients of the forward kernel's results; `results`: of r, k, v, v_first, decay,
    iclr, value; None where there is none. WANTED has a bit for each of w0 .. r_k, which `partial`
    holds in that order.
    """
    channels, inside, h = head_tile(H, N, HEADS)
    w0_ = read(w0, channels, inside)
    a0_ = read(a0, channels, inside)
    v0_ = read(v0, channels, inside)
    k_k_ = read(k_k, channels, inside)
    k_a_ = read(k_a, channels, inside)
    r_k_ = read(r_k, channels, inside)
    sum_w0 = tl.zeros([HEADS, N], tl.float32)
    sum_a0 = sum_w0
    sum_v0 = sum_w0
    sum_k_k = sum_w0
    sum_k_a = sum_w0
    sum_r_k = sum_w0
    first = tl.program_id(0) * count
    for step in tl.range(0, tl.minimum(count, rows - first), num_stages=STAGES):
        row = first + step
        at = row.to(tl.int64) * (H * N) + channels
        k_ = read(k, at, inside)
        r_ = read(r, at, inside)
        rate = tl.sigmoid(read(iclr, at, inside) + a0_)
        shrink = 1.0 + (rate - 1.0) * k_a_
        grad_bonus = read(given[6], row.to(tl.int64) * H + h, h < H)[:, None]
        grad_key = read(given[2], at, inside) + grad_bonus * r_ * r_k_
        bonus_key = grad_bonus * k_ * shrink
        write(results[0], at, read(given[0], at, inside) + bonus_key * r_k_, inside)

        u = k_ * k_k_
        length = _length(u)
        kk = u / length
        grad_b = read(given[5], at, inside)
        grad_kk = grad_b * rate - read(given[4], at, inside)
        along = tl.sum(kk * grad_kk, axis=1)[:, None]
        # A head of zeros is divided by a constant.
        grad_u = (grad_kk - tl.where(length > 1e-12, kk * along, 0.0)) / length
        write(results[1], at, grad_key * shrink + grad_u * k_k_, inside)
        grad_rate = grad_b * kk + grad_key * k_ * k_a_
        grad_iclr = grad_rate * rate * (1.0 - rate)
        write(results[5], at, grad_iclr, inside)
        decay_ = read(decay, at, inside) + w0_
        grad_decay = read(given[1], at, inside) * tl.sigmoid(-decay_)
        write(results[4], at, grad_decay, inside)

        grad_v = read(given[3], at, inside) + read(given[7], at, inside)
        grad_first = read(given[8], at, inside)
        if v_first is None:
            write(results[2], at, grad_v + grad_first, inside)
        else:
            v_ = read(v, at, inside)
            share = tl.sigmoid(read(value, at, inside) + v0_)
            taken = grad_v * share
            write(results[2], at, grad_v - taken, inside)
            write(results[3], at, grad_first + taken, inside)
            grad_value = taken * (1.0 - share) * (read(v_first, at, inside) - v_)
            write(results[6], at, grad_value, inside)
            if WANTED & 4:
                sum_v0 += grad_value
        if WANTED & 1:
            sum_w0 += grad_decay
        if WANTED & 2:
            sum_a0 += grad_iclr
        if WANTED & 8:
            sum_k_k += grad_u * k_
        if WANTED & 16:
            sum_k_a += grad_key * k_ * (rate - 1.0)
        if WANTED & 32:
            sum_r_k += bonus_key * r_

    target = partial + tl.program_id(0).to(tl.int64) * SUMS * (H * N) + channels
    sums = (sum_w0, sum_a0, sum_v0, sum_k_k, sum_k_a, sum_r_k)
    for i in tl.static_range(6):
        if (WANTED >> i) & 1:
            tl.store(target, sums[i], mask=inside)
            target += H * N
