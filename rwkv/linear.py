"""The one linear layer of the model; adapters and quantized storage both build on it."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightStore(Protocol):
    """A frozen weight [out, in] kept in fewer bits. Implementations live in peft/.

    It is a module without parameters, so that it moves with the model and trains nothing.
    """

    def output(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], differentiable in x."""
        ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], dequantized."""
        ...

    def bytes(self) -> int:
        """Bytes that codes and scales occupy."""
        ...


class Linear(nn.Module):
    """y = x W^T, without bias.

    W is the parameter `weight` [out, in] or, after `store_as`, a frozen WeightStore. Subclasses
    (the adapters) reach it through `dense_weight` and `base_output` only, so every adapter works
    over every store.
    """

    weight: nn.Parameter | None
    store: WeightStore | None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
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

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] with which a plain Linear gives this layer's output."""
        return self.dense_weight(dtype)

    def base_output(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], without any adapter."""
        if self.weight is not None:
            return F.linear(x, self.weight)
        assert self.store is not None
        return self.store.output(x)

    def output(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], as the layer is now."""
        return self.base_output(x)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out], added to `residual` [..., out] where one is given."""
        out = self.output(x)
        return out if residual is None else residual + out

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"
