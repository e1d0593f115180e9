"""DoRA: LoRA whose result is rescaled to a trained magnitude.

Source: arXiv:2402.09353, eq. 5, with the norm held constant in the gradient (section 4.3).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peft.lora import LoraLinear
from rwkv.linear import Linear

TINY = 1e-6  # RWKV-LM-RLHF adds it to its norms
SMALLEST = torch.finfo(torch.float32).tiny  # a row of zeros has no length to be divided by


class DoraLinear(LoraLinear):
    """y = x W'^T, where W' = M V / |V| and V = W + scale * B A.

    |V| is the length of each row (an output) of V; M starts at |W|, so a fresh adapter changes
    nothing: M is float32 in a model of any dtype, for in bfloat16 a length is off by up to 0.2%.
    DeepSpeed casts it nevertheless. Saved as LoRA's names and `X.lora_M` [out, 1].

    The lengths need neither V nor a dequantized W:
    |V_i|^2 = |W_i|^2 + 2 scale B_i (W_i A^T)^T + scale^2 B_i A A^T B_i^T, where W A^T is the
    base's own output for the rank rows of A.
    """

    MODE = "dora"
    PARTS = ("lora_A", "lora_B", "lora_M")
    WIDE = ("lora_M",)
    lora_M: nn.Parameter
    squared: Tensor  # as of `_squares`

    def __init__(self, base: Linear, *, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, rank=rank, scale=scale, dropout=dropout)
        self.register_buffer("squared", self._squares(), persistent=False)

    @staticmethod
    def sizes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {
            "lora_A": (rank, in_features),
            "lora_B": (out_features, rank),
            "lora_M": (out_features, 1),
        }

    def _first(self, part: str, zeros: Tensor) -> Tensor:
        if part == "lora_M":
            return self._squares().sqrt().view(zeros.shape)
        return super()._first(part, zeros)

    @torch.no_grad()
    def _squares(self) -> Tensor:
        """|W_i|^2 of each row, [out], float32."""
        return torch.cat([some.square().sum(dim=1) for some in self.weight_slices()])

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """|V_i| of each row, [out], float32."""
        A, B = self.lora_A, self.lora_B.float()
        cross = self.base_output(A).float().T  # W A^T, [out, rank]
        inner = A.float() @ A.float().T
        squared = (
            self.squared
            + 2 * self.scale * (B * cross).sum(dim=1)
            + self.scale**2 * ((B @ inner) * B).sum(dim=1)
        )
        return squared.clamp_min(0).sqrt().clamp_min(SMALLEST)

    def adapted_output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        factor = self.lora_M.float().squeeze(1) / self.lengths()
        out = factor.to(x.dtype) * self.low_rank_output(x)
        return out if residual is None else residual + out

    def activated_output(self, x: Tensor) -> Tensor:
        return Linear.activated_output(self, x)  # LoRA's knows no lengths

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        V = super().merged_weight(dtype)
        return self.lora_M.to(dtype) * V / V.norm(dim=1, keepdim=True).clamp_min(SMALLEST)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoraLinear":
        """Follow a move to a device; `squared` keeps float32 under Lightning's bf16-true."""
        squared = self.squared
        super()._apply(fn, recurse)
        self.squared = squared.to(self.squared.device)
        return self


class ColumnDoraLinear(DoraLinear):
    """DoRA as RWKV-LM-RLHF trains it: |V| is the length of each column (an input) of V.

    y = x W'^T, where W' = V diag(M / (|V| + 1e-6)). Saved as `X.lora_M` [1, in]; the shape tells
    the two variants apart. The lengths need the dequantized W, which makes this one slower.
    """

    MODE = "dora_column"

    @staticmethod
    def sizes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        parts = DoraLinear.sizes(out_features, in_features, rank)
        return parts | {"lora_M": (1, in_features)}

    @torch.no_grad()
    def _squares(self) -> Tensor:
        """|W_j|^2 of each column, [in], float32."""
        return torch.stack([some.square().sum(dim=0) for some in self.weight_slices()]).sum(dim=0)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """|V_j| of each column, [in], float32."""
        return LoraLinear.merged_weight(self).norm(dim=0) + TINY

    def adapted_output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        factor = self.lora_M.float().squeeze(0) / self.lengths()
        return self.low_rank_output(x * factor.to(x.dtype), residual, unread=self.is_unread())

    def merged_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        V = LoraLinear.merged_weight(self, dtype)
        return self.lora_M.to(dtype) * V / (V.norm(dim=0, keepdim=True) + TINY)
