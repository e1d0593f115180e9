"""Bone, as RWKV-LM-RLHF trains it: a block-affine update of the weight.

Other projects gave the name away: RWKV-PEFT and HF peft call this one "bat", and use "bone"
(later DiSHA, MiSS) for a plain [rank, out] update, which is mode "miss" here. HF peft's bat
indexes its blocks by the output, this one by the input, so their files do not fit each other.
Source: arXiv:2409.15371.
"""

import torch
from torch import Tensor, nn

from peft.adapter import AdapterLinear, check_rank
from rwkv.errors import InputError
from rwkv.linear import Linear


class BoneLinear(AdapterLinear):
    """y = x (W + dW)^T, where each [rank, rank] block of dW is W_block G_j + G_j.

    Every block in column j of W shares G_j. Saved as `X.bone` [in / rank, rank, rank]. G starts
    at zero, so a fresh adapter changes nothing.
    """

    MODE = "bone"
    PARTS = ("bone",)
    bone: nn.Parameter

    def __init__(self, base: Linear, *, rank: int):
        super().__init__(base)
        self.add_parts(rank, lambda _, zeros: zeros)

    @staticmethod
    def sizes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        check_rank("bone", out_features, in_features, rank)
        if in_features % rank or out_features % rank:
            raise InputError(
                f"bone: rank {rank} does not divide both sides of a "
                f"[{out_features}, {in_features}] weight; choose one that does, such as "
                f"{_nearest_divisor(out_features, in_features, rank)}"
            )
        return {"bone": (in_features // rank, rank, rank)}

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight, bone, rank = self.dense_weight(dtype), self.bone.to(dtype), self.bone.shape[-1]
        blocks = weight.reshape(-1, rank, weight.shape[1] // rank, rank).transpose(1, 2)
        update = blocks @ bone + bone  # [out / rank, in / rank, rank, rank]
        return weight + update.transpose(1, 2).reshape_as(weight)

    def adapted_output(self, x: Tensor) -> Tensor:
        """base(x + z) + sum_j z_j in every output block, where z_j = x_j G_j^T.

        Equal to x (W + dW)^T without building dW: sum_j x_j (W_ij G_j + G_j)^T
        = sum_j z_j W_ij^T + sum_j z_j for output block i.
        """
        rank = self.bone.shape[-1]
        z = torch.einsum("...jq,jpq->...jp", x.unflatten(-1, (-1, rank)), self.bone.to(x.dtype))
        tiled = z.sum(dim=-2).repeat(*[1] * (x.ndim - 1), self.out_features // rank)
        return self.base_output(x + z.flatten(-2)) + tiled


def _nearest_divisor(out_features: int, in_features: int, rank: int) -> int:
    """The common divisor of both sides that is nearest to `rank`."""
    fitting = (n for n in range(1, 2 * rank) if not (in_features % n or out_features % n))
    return min(fitting, key=lambda n: abs(n - rank))
