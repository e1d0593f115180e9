"""LoRA: a trainable low-rank update beside a frozen weight.

Source: arXiv:2106.09685; the rank-stabilized scale is that of rsLoRA, arXiv:2312.03732.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft.adapter import AdapterLinear
from rwkv.keeper import Kept, kept_result
from rwkv.linear import Linear, unread_output
from rwkv.ops.activation import squared_relu_gradient
from rwkv.ops.low_rank import plus_product


def lora_scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """The factor of the update: alpha / rank or, rank-stabilized, alpha / sqrt(rank)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoraLinear(AdapterLinear):
    """y = x W^T + scale * dropout(x) A^T B^T

    Saved beside the base key `X.weight` as `X.lora_A` [rank, in] and `X.lora_B` [out, rank], the
    names RWKV-LM-RLHF uses. B starts at zero, so a fresh adapter changes nothing.
    """

    MODE = "lora"
    PARTS: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: Linear, *, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.add_parts(rank, self._first)

    @staticmethod
    def sizes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}

    def _first(self, part: str, zeros: Tensor) -> Tensor:
        return nn.init.kaiming_uniform_(zeros, a=math.sqrt(5)) if part == "lora_A" else zeros

    def update(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]: what the adapter adds to the base's output."""
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def low_rank_output(
        self, x: Tensor, residual: Tensor | None = None, *, unread: bool = False
    ) -> Tensor:
        """The base's output and the update, [..., out]; `unread` as in `base_output`."""
        if self.dropout.p and self.training:
            return self.base_output(x, residual) + self.update(x)
        out: Tensor = _LowRank.apply(x, residual, self.lora_A, self.lora_B, self, unread)
        return out

    def adapted_output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.low_rank_output(x, residual, unread=self.is_unread())

    def activated_output(self, x: Tensor) -> Tensor:
        if not self.active or (self.dropout.p and self.training):
            return super().activated_output(x)
        out: Tensor = _Activated.apply(x, self.lora_A, self.lora_B, self)
        return out

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        update = self.lora_B.to(dtype) @ self.lora_A.to(dtype)
        return self.dense_weight(dtype) + self.scale * update


class _LowRank(torch.autograd.Function):
    """residual + x W^T + scale x A^T B^T, keeping x and x A^T alone.

    The update is written first and the base's product, which adds at no cost, to it: neither the
    output nor the gradient of x is read and written once more for an addition.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        A: Tensor,
        B: Tensor,
        layer: LoraLinear,
        unread: bool,
    ) -> Tensor:
        low = _low(x, A, layer)
        ctx.layer, ctx.scale = layer, layer.scale
        ctx.save_for_backward(x, low, A, B)
        if unread:
            return unread_output(x, layer.out_features, residual)
        return layer.kept(lambda: _low_rank_output(x, residual, low, B, layer))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dA, dB = _gradients(ctx, ctx.saved_tensors, grad, ctx.needs_input_grad[2:4])
        return dx, grad if ctx.needs_input_grad[1] else None, dA, dB, None, None


class _Activated(torch.autograd.Function):
    """max(x W^T + scale x A^T B^T, 0)^2, keeping x, x A^T and the result.

    The activation is applied where the update is added, which reads and writes the output anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, layer: LoraLinear) -> Tensor:
        low = _low(x, A, layer)
        y = layer.kept(lambda: _activated_output(x, low, B, layer))
        ctx.layer, ctx.scale = layer, layer.scale
        ctx.save_for_backward(x, low, A, B, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, y = ctx.saved_tensors
        grad = squared_relu_gradient(y, grad)
        return *_gradients(ctx, saved, grad, ctx.needs_input_grad[1:3]), None


def _low(x: Tensor, A: Tensor, layer: LoraLinear) -> Tensor:
    """scale x A^T, [n, rank]. It is small, and keeping it spares another reading of x."""
    rows = x.reshape(-1, x.shape[-1])
    kept = Kept.LAST if layer.closes else Kept.SMALL
    return kept_result(lambda: _product(rows, A.to(x.dtype).T, layer.scale), kept)


def _low_rank_output(
    x: Tensor, residual: Tensor | None, low: Tensor, B: Tensor, layer: LoraLinear
) -> Tensor:
    shape = (*x.shape[:-1], layer.out_features)
    if layer.adds_freely(x) and (residual is None or residual.dtype == x.dtype):
        before = None if residual is None else residual.reshape(-1, shape[-1])
        out = x.new_empty(shape)  # no view: losses write over logits
        plus_product(before, low, B.to(x.dtype).T, out=out.view(-1, shape[-1]))
        return layer.product(x, out)
    out = layer.product_beside(x, residual)
    flat = out.view(-1, shape[-1])
    plus_product(flat, low.to(out.dtype), B.to(out.dtype).T, out=flat)
    return out


def _activated_output(x: Tensor, low: Tensor, B: Tensor, layer: LoraLinear) -> Tensor:
    y = layer.product(x)
    flat = y.view(-1, layer.out_features)
    plus_product(flat, low, B.to(y.dtype).T, out=flat, activated=True)
    return y


def _gradients(
    ctx: Any, saved: Sequence[Tensor], grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, A and B, from the gradient of the output before any activation.

    wanted: whether A and B have a gradient.
    """
    x, low, A, B = saved
    rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).to(x.dtype)
    d_low = _product(g, B.to(g.dtype), ctx.scale)
    dx = None
    if ctx.needs_input_grad[0]:
        factor, wide = A.to(g.dtype), g.view(grad.shape)
        if ctx.layer.adds_freely(g):
            dx = ctx.layer.gradient(wide, plus_product(None, d_low, factor).view(x.shape))
        else:
            dx = ctx.layer.gradient(wide)
            plus_product(dx.view(rows.shape), d_low, factor, out=dx.view(rows.shape))
    dA = (d_low.T @ rows).to(A.dtype) if wanted[0] else None
    dB = (g.T @ low).to(B.dtype) if wanted[1] else None
    return dx, dA, dB


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor a b, the factor inside the product."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=factor)  # 0 times it is never read
