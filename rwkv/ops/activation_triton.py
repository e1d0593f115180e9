"""activation in Triton: element-wise kernels over tensors of any shape."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv.ops.triton_chunks import narrow, widen

BLOCK = 4096  # elements of a program: two accesses of 16 bytes a thread


def squared_relu(x: Tensor) -> Tensor:
    return _SquaredRelu.apply(x.contiguous())


def squared_relu_gradient(y: Tensor, grad: Tensor) -> Tensor:
    grad_x = torch.empty_like(y)
    _launch(_squared_relu_backward_kernel, y, grad.contiguous(), grad_x)
    return grad_x


def gated_sum(x: Tensor, gate: Tensor, value: Tensor) -> Tensor:
    return _GatedSum.apply(x.contiguous(), gate.contiguous(), value.contiguous())


def _launch(kernel: Any, *tensors: Tensor) -> None:
    size = tensors[0].numel()
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(size, BLOCK),)](*tensors, size, BLOCK=BLOCK, num_warps=8)


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        _launch(_squared_relu_kernel, x, y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (y,) = ctx.saved_tensors
        return squared_relu_gradient(y, grad)


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        y = torch.empty_like(x)
        _launch(_gated_sum_kernel, x, gate, value, y)
        ctx.save_for_backward(gate, value)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        if not any(ctx.needs_input_grad[1:]):
            return grad, None, None
        gate, value = ctx.saved_tensors
        grad_gate, grad_value = torch.empty_like(gate), torch.empty_like(value)
        _launch(_gated_sum_backward_kernel, gate, value, grad.contiguous(), grad_gate, grad_value)
        return grad, grad_gate, grad_value


@triton.jit
def _span(size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < size


@triton.jit
def _squared_relu_kernel(x, y, size, BLOCK: tl.constexpr):
    at, inside = _span(size, BLOCK)
    value = widen(tl.load(x + at, mask=inside, other=0.0))
    positive = tl.where(value < 0.0, 0.0, value)  # a NaN stays one
    tl.store(y + at, narrow(positive * positive, y.dtype.element_ty), mask=inside)


@triton.jit
def _squared_relu_backward_kernel(y, grad, grad_x, size, BLOCK: tl.constexpr):
    at, inside = _span(size, BLOCK)
    positive = tl.sqrt(widen(tl.load(y + at, mask=inside, other=0.0)))
    result = 2.0 * positive * widen(tl.load(grad + at, mask=inside, other=0.0))
    tl.store(grad_x + at, narrow(result, grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _gated_sum_kernel(x, gate, value, y, size, BLOCK: tl.constexpr):
    at, inside = _span(size, BLOCK)
    open_ = tl.sigmoid(widen(tl.load(gate + at, mask=inside, other=0.0)))
    result = widen(tl.load(x + at, mask=inside, other=0.0))
    result += open_ * widen(tl.load(value + at, mask=inside, other=0.0))
    tl.store(y + at, narrow(result, y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_sum_backward_kernel(gate, value, grad, grad_gate, grad_value, size, BLOCK: tl.constexpr):
    at, inside = _span(size, BLOCK)
    open_ = tl.sigmoid(widen(tl.load(gate + at, mask=inside, other=0.0)))
    grad_ = widen(tl.load(grad + at, mask=inside, other=0.0))
    value_ = widen(tl.load(value + at, mask=inside, other=0.0))
    result = grad_ * value_ * open_ * (1.0 - open_)
    tl.store(grad_gate + at, narrow(result, grad_gate.dtype.element_ty), mask=inside)
    result = grad_ * open_
    tl.store(grad_value + at, narrow(result, grad_value.dtype.element_ty), mask=inside)
