"""The element-wise parts of the channel mixes."""

import torch
from torch import Tensor

from rwkv.ops import fused


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2. The kernel keeps the result for the backward pass, as what reads it does."""
    if fused.uses_kernels(x):
        from rwkv.ops.activation_triton import squared_relu as run

        return run(x)
    return torch.relu(x).square()


def squared_relu_gradient(y: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x, given y = max(x, 0)^2 and its gradient; without history."""
    if fused.uses_kernels(y):
        from rwkv.ops.activation_triton import squared_relu_gradient as run

        return run(y, grad)
    return 2 * y.sqrt() * grad


def gated_sum(x: Tensor, gate: Tensor, value: Tensor) -> Tensor:
    """x + sigmoid(gate) value, all of one shape; the kernel keeps gate and value."""
    if fused.uses_kernels(x):
        from rwkv.ops.activation_triton import gated_sum as run

        return run(x, gate, value)
    return torch.addcmul(x, torch.sigmoid(gate), value)
