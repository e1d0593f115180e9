"""Row-wise int8 storage in plain torch."""

from typing import Any

import torch
from torch import Tensor

from peft.store import Store


class Int8Store(Store):
    """A weight as int8 with one float32 scale a row.

    The largest error of an element is half a step, max|row| / 254, in float32.
    """

    codes: Tensor  # [out, in], int8
    scale: Tensor  # [out, 1], float32

    def __init__(self, kind: str, weight: Tensor):
        super().__init__(kind, weight)
        weight = weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        self.keep(codes=torch.round(weight / scale).to(torch.int8), scale=scale)

    @staticmethod
    def size(out_features: int, in_features: int, **options: Any) -> int:
        return out_features * in_features + 4 * out_features

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scale).to(dtype)
