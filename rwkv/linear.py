"""The model's matrices: the one linear layer, on which adapters build, and the embedding.

Either holds its weight as a parameter or as a store of fewer bits.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv.keeper import in_second_run, kept_result
from rwkv.ops.activation import squared_relu

SLICE = 2**20  # numbers worked on at once, where that takes many bytes for each


class WeightStore(Protocol):
    """A frozen weight [out, in] kept in fewer bits. Implementations live in peft/.

    It is a module without parameters, so that it moves with the model and trains nothing.

    kind: the word for its format, such as nf4.
    dtype: of the weight that it stands for.
    """

    kind: str
    dtype: torch.dtype

    def adds_freely(self, x: Tensor) -> bool:
        """Whether products of x's kind add to a tensor without another pass over it."""
        ...

    def forward_product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """x W^T, without history, [..., in] -> [..., out]: a new tensor, or `into` += it."""
        ...

    def backward_product(
        self, grad: Tensor, into: Tensor | None = None, *, of_logits: bool = False
    ) -> Tensor:
        """grad W, without history, [..., out] -> [..., in]: a new tensor, or `into` += it.

        of_logits: grad is that of logits, of magnitudes that no whole numbers of 8 bits tell apart.
        """
        ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], dequantized."""
        ...

    def slices(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight, dequantized, [n, in], its rows in order and some at a time."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, dequantized, [...] -> [..., in]."""
        ...

    def bytes(self) -> int:
        """Bytes that codes and scales occupy."""
        ...


class Matrix(nn.Module):
    """A weight: the parameter `weight` [out, in] or, after `store_as`, a frozen WeightStore."""

    weight: nn.Parameter | None
    store: WeightStore | None

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.store = None

    def store_as(self, store: WeightStore) -> None:
        """Keep the weight as `store` from here on; the parameter is dropped."""
        self.weight = None
        self.store = store

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The base weight [out, in], dequantized if it is stored."""
        if self.weight is not None:
            return self.weight.to(dtype)
        assert self.store is not None
        return self.store.dense(dtype)

    def weight_slices(self, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """As `dense_weight`, SLICE numbers at a time: some rows, [n, in], behind the others."""
        if self.weight is not None:
            for some in self.weight.split(rows_at_once(self.weight.shape[1])):
                yield some.to(dtype)
            return
        assert self.store is not None
        yield from self.store.slices(dtype)


def rows_at_once(width: int) -> int:
    """Rows of a matrix that hold SLICE numbers, at least one."""
    return max(1, SLICE // max(1, width))


class Embedding(Matrix):
    """A row of the weight [V, C] for each token."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [...] -> [..., C]."""
        if self.weight is not None:
            return F.embedding(tokens, self.weight)
        assert self.store is not None
        return self.store.rows(tokens)


class Linear(Matrix):
    """y = x W^T, without bias.

    Subclasses (the adapters) reach W through `dense_weight`, `base_output`, `product` and
    `gradient` only, so every adapter works over every store.

    Attributes:
        closes: whether nothing but the stream reads the output: it is the last of a part of the
            model that may be run again, and its result is then left out.
        gives_logits: whether it is the head.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.closes = self.gives_logits = False

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] with which a plain Linear gives this layer's output."""
        return self.dense_weight(dtype)

    def adds_freely(self, x: Tensor) -> bool:
        """Whether `product` and `gradient` of x's kind add to `into` without another pass."""
        return self.store is None or self.store.adds_freely(x)

    def product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """x W^T, without history and adapter: [..., in] -> a new tensor [..., out].

        into: of that shape and x's dtype, contiguous: what it is added to, in place.
        """
        if self.weight is not None:
            return matrix_product(x, self.weight.T, into)
        assert self.store is not None
        return self.store.forward_product(x, into)

    def gradient(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        """grad W, without history and adapter: [..., out] -> a new tensor [..., in].

        into: as in `product`.
        """
        if self.weight is not None:
            return matrix_product(grad, self.weight, into)
        assert self.store is not None
        return self.store.backward_product(grad, into, of_logits=self.gives_logits)

    def product_beside(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """x W^T + residual, without history and adapter: a new tensor [..., out]."""
        if residual is None:
            return self.product(x)
        if residual.dtype == x.dtype and self.adds_freely(x):
            return self.product(x, residual.clone(memory_format=torch.contiguous_format))
        return residual + self.product(x)

    def kept(self, output: Callable[[], Tensor]) -> Tensor:
        """output(), or what it gave when a part was run for the first time, where that is kept.

        The output of a layer that closes its part is not. No view, for losses write over logits,
        and autograd allows that behind one of its functions for tensors of their own alone.
        """
        out = output() if self.closes else kept_result(output)
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    def is_unread(self) -> bool:
        """Whether the output may be left out: the values of this run go nowhere."""
        return self.closes and in_second_run()

    def base_output(
        self, x: Tensor, residual: Tensor | None = None, *, unread: bool = False
    ) -> Tensor:
        """[..., in] -> [..., out], without any adapter; keeps x only where the weight trains.

        unread: give an uninitialized tensor with the right gradient.
        """
        out: Tensor = _Product.apply(x, residual, self.weight, self, unread)
        return out

    def output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out], as the layer is now."""
        return self.base_output(x, residual, unread=self.is_unread())

    def activated_output(self, x: Tensor) -> Tensor:
        """max(output, 0)^2, [..., in] -> [..., out]."""
        return squared_relu(self.output(x))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, activated: bool = False
    ) -> Tensor:
        """[..., in] -> [..., out], added to `residual` [..., out] where one is given.

        activated: give max(output, 0)^2, without a residual.
        """
        return self.activated_output(x) if activated else self.output(x, residual)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def matrix_product(x: Tensor, matrix: Tensor, into: Tensor | None) -> Tensor:
    """x [..., n] matrix [n, m]: a new tensor or, where `into` [..., m] is given, `into` += it."""
    if into is None:
        return x @ matrix
    into.view(-1, matrix.shape[1]).addmm_(x.reshape(-1, matrix.shape[0]), matrix)
    return into


def unread_output(x: Tensor, features: int, residual: Tensor | None) -> Tensor:
    """What stands for an output [..., features] that is left out: memory as it was found."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty((*x.shape[:-1], features), dtype=dtype)


class _Product(torch.autograd.Function):
    """x W^T + residual; the backward pass reads the layer's weight or codes again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        layer: Linear,
        unread: bool,
    ) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None)
        if unread:
            return unread_output(x, layer.out_features, residual)
        return layer.kept(lambda: layer.product_beside(x, residual))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        g = grad.to(ctx.dtype)
        dx = ctx.layer.gradient(g) if ctx.needs_input_grad[0] else None
        dw = None if x is None else g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return dx, grad if ctx.needs_input_grad[1] else None, dw, None, None
