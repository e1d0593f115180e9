"""LoRA: a trainable low-rank update beside a frozen weight.

Source: arXiv:2106.09685; the rank-stabilized scale is that of rsLoRA, arXiv:2312.03732.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft.adapter import AdapterLinear, check_rank
from rwkv.linear import Linear


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
        check_rank("lora", out_features, in_features, rank)
        return {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}

    def _first(self, part: str, zeros: Tensor) -> Tensor:
        return nn.init.kaiming_uniform_(zeros, a=math.sqrt(5)) if part == "lora_A" else zeros

    def update(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]: what the adapter adds to the base's output."""
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def adapted_output(self, x: Tensor) -> Tensor:
        return self.base_output(x) + self.update(x)

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        update = self.lora_B.to(dtype) @ self.lora_A.to(dtype)
        return self.dense_weight(dtype) + self.scale * update
