"""Row-wise int8 storage in plain torch."""

import torch
from torch import Tensor

from peft.store import Store


class Int8Store(Store):
    """A weight as int8 with one float32 scale a row.

    The largest error of an element is half a step, max|row| / 254, in float32.
    """

    codes: Tensor  # [out, in], int8
    scale: Tensor  # [out, 1], float32

    @staticmethod
    def size(kind: str, out_features: int, in_features: int) -> int:
        return out_features * in_features + 4 * out_features

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.float()
        # a product, not a quotient: the same on a GPU as on a CPU, bit for bit
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) * (1 / 127)
        return {"codes": torch.round(weight / scale).to(torch.int8), "scale": scale}

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scale).to(dtype)
