"""head_output in Triton: one kernel forward, one backward, which norms y again."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv.ops.fused import flags, sums_of_programs
from rwkv.ops.heads_triton import head_grid, head_tile, read, write


def head_output(
    y: Tensor, norm: nn.GroupNorm, bonus: Tensor | None, v: Tensor | None, gate: Tensor
) -> Tensor:
    """(norm(y) + bonus v) gate or, without bonus, norm(y) silu(gate)."""
    given = (None if x is None else x.contiguous() for x in (y, bonus, v, gate))
    return _HeadOutput.apply(*given, norm.weight, norm.bias, norm.eps)


class _HeadOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        bonus: Tensor | None,
        v: Tensor | None,
        gate: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        B, T, H, N = y.shape
        out = torch.empty_like(gate)
        grid, sizes = head_grid(B * T, H, N, y.device, programs=64, most=16)
        with torch.cuda.device_of(y):
            _forward_kernel[grid](
                *(y, bonus, v, gate, weight, bias, out, B * T), **sizes, eps=eps, num_warps=1
            )
        ctx.save_for_backward(y, bonus, v, gate, weight, bias)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        saved = ctx.saved_tensors
        y, *_, weight, bias = saved
        B, T, H, N = y.shape
        need, wanted = ctx.needs_input_grad[:4], ctx.needs_input_grad[4:6]
        results = [
            torch.empty_like(x) if needed else None for x, needed in zip(saved, need, strict=False)
        ]
        sums = sum(wanted)
        grid, sizes = head_grid(
            B * T, H, N, y.device, programs=16 if sums else 64, most=None if sums else 32
        )
        partial = y.new_empty(grid[0], sums, H * N, dtype=torch.float32)
        with torch.cuda.device_of(y):
            _backward_kernel[grid](
                *(*saved, grad.contiguous(), tuple(results), partial, B * T),
                **sizes,
                eps=ctx.eps,
                WANTED=flags(wanted),
                SUMS=sums,
                num_warps=1,
            )
        return *results, *sums_of_programs(partial, [weight, bias], wanted), None


@triton.jit
def _unit(y, N: tl.constexpr, eps):
    """y [HEADS, N] without its heads' means and spreads, and one over the spreads [HEADS, 1]."""
    centered = y - (tl.sum(y, axis=1) / N)[:, None]
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / N + eps)[:, None]
    return centered * rstd, rstd


@triton.jit(do_not_specialize=["rows", "count", "eps"])
def _forward_kernel(
    y,
    bonus,
    v,
    gate,
    weight,
    bias,
    out,
    rows,
    count,
    eps,
    H: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
):
    channels, inside, h = head_tile(H, N, HEADS)
    scale = read(weight, channels, inside)
    offset = read(bias, channels, inside)
    first = tl.program_id(0) * count
    for step in range(0, tl.minimum(count, rows - first)):
        row = first + step
        at = row.to(tl.int64) * (H * N) + channels
        gate_ = read(gate, at, inside)
        unit, _ = _unit(read(y, at, inside), N, eps)
        total = unit * scale + offset
        if bonus is None:
            total *= gate_ * tl.sigmoid(gate_)
        else:
            bonus_ = read(bonus, row.to(tl.int64) * H + h, h < H)[:, None]
            total = (total + bonus_ * read(v, at, inside)) * gate_
        write(out, at, total, inside)


@triton.jit(do_not_specialize=["rows", "count", "eps"])
def _backward_kernel(
    y,
    bonus,
    v,
    gate,
    weight,
    bias,
    grad,
    results,
    partial,
    rows,
    count,
    eps,
    H: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    WANTED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """`results`: the gradients of y, bonus, v and gate, None where there is none; WANTED has a
    bit for each of weight and bias, which `partial` holds in that order.
    """
    channels, inside, h = head_tile(H, N, HEADS)
    scale = read(weight, channels, inside)
    offset = read(bias, channels, inside)
    sum_scale = tl.zeros([HEADS, N], tl.float32)
    sum_offset = sum_scale
    first = tl.program_id(0) * count
    for step in range(0, tl.minimum(count, rows - first)):
        row = first + step
        at = row.to(tl.int64) * (H * N) + channels
        grad_ = read(grad, at, inside)
        gate_ = read(gate, at, inside)
        unit, rstd = _unit(read(y, at, inside), N, eps)
        total = unit * scale + offset
        if bonus is None:
            open_ = tl.sigmoid(gate_)
            grad_gate = grad_ * total * open_ * (1.0 + gate_ * (1.0 - open_))
            grad_total = grad_ * gate_ * open_
        else:
            of_head = row.to(tl.int64) * H + h
            bonus_ = read(bonus, of_head, h < H)[:, None]
            v_ = read(v, at, inside)
            grad_total = grad_ * gate_
            grad_gate = grad_ * (total + bonus_ * v_)
            write(results[1], of_head, tl.sum(grad_total * v_, axis=1), h < H)
            write(results[2], at, grad_total * bonus_, inside)
        write(results[3], at, grad_gate, inside)
        grad_unit = grad_total * scale
        mean = (tl.sum(grad_unit, axis=1) / N)[:, None]
        along = (tl.sum(grad_unit * unit, axis=1) / N)[:, None]
        write(results[0], at, rstd * (grad_unit - mean - unit * along), inside)
        if WANTED & 1:
            sum_scale += grad_total * unit
        if WANTED & 2:
            sum_offset += grad_total

    target = partial + tl.program_id(0).to(tl.int64) * SUMS * (H * N) + channels
    if WANTED & 1:
        tl.store(target, sum_scale, mask=inside)
        target += H * N
    if WANTED & 2:
        tl.store(target, sum_offset, mask=inside)
