"""MiSS: one trained [rank, out] matrix that all slices of the input share.

RWKV-PEFT's "bone" and HF peft's MissConfig. Source: arXiv:2409.15371, later versions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft.adapter import AdapterLinear, check_rank
from rwkv.linear import Linear


class MissLinear(AdapterLinear):
    """y = x W^T + (sum_j x_j) D, where x_j are the slices of `rank` channels of x.

    So every [out, rank] slice of W gets D^T; a last slice that is not whole gets D's first rows.
    Saved as `X.miss` [rank, out]. D starts at zero, so a fresh adapter changes nothing. The base
    weight is never read, which suits quantized ones.
    """

    MODE = "miss"
    PARTS = ("miss",)
    miss: nn.Parameter

    def __init__(self, base: Linear, *, rank: int):
        super().__init__(base)
        self.add_parts(rank, lambda _, zeros: zeros)

    @staticmethod
    def sizes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        check_rank("miss", out_features, in_features, rank)
        return {"miss": (rank, out_features)}

    def adapted_output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rank = self.miss.shape[0]
        slices = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank))
        update = slices.sum(dim=-2) @ self.miss.to(x.dtype)
        return self.base_output(x, update if residual is None else residual + update)

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        slices = -(-self.in_features // self.miss.shape[0])
        update = self.miss.to(dtype).T.repeat(1, slices)[:, : self.in_features]
        return self.dense_weight(dtype) + update
