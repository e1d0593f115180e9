"""PiSSA: LoRA that starts from the largest singular directions of the weight.

Source: arXiv:2404.02948.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from peft.lora import LoraLinear
from peft.store import fill
from rwkv.errors import InputError
from rwkv.linear import Linear, rows_at_once

NEAR = 1e-2  # relative distance of first directions that are taken for the same over codes


class PissaLinear(LoraLinear):
    """y = x R^T + scale * dropout(x) A^T B^T, with R = W - scale * B_0 A_0 frozen.

    A_0 and B_0 are the rank largest singular directions of W, each with the root of its singular
    value over `scale`. A quantized base stores R, so build this over a dense weight and store
    afterwards. In a file it is the plain LoRA of rank 2 rank that gives the same weight over W:
    `X.lora_A` = [A; -A_0], `X.lora_B` = [B, B_0].
    """

    MODE = "pissa"
    first_A: Tensor
    first_B: Tensor

    def __init__(
        self, base: Linear, *, rank: int, scale: float, dropout: float = 0.0, power: int = 4
    ):
        """power: power iterations of the randomized SVD; 0, or a rank above a quarter of the
        weight's smaller side, for the exact one."""
        if base.weight is None:
            raise InputError("pissa: needs the weight itself; store the layer after it is made")
        super().__init__(base, rank=rank, scale=scale, dropout=dropout)
        A, B = (part / scale**0.5 for part in _principal(base.weight.detach(), rank, power))
        self.load_fresh(A, B)
        self.register_buffer("first_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("first_B", self.lora_B.detach().clone(), persistent=False)
        rest = torch.empty_like(base.weight)
        fill((rest,), self._rest(base.weight.detach()))
        self.weight = nn.Parameter(rest, requires_grad=False)

    def _rest(self, weight: Tensor) -> Iterator[tuple[Tensor]]:
        """W - scale * B_0 A_0, float32, some rows at a time."""
        count, A = rows_at_once(self.in_features), self.first_A.float()
        for some, B in zip(weight.split(count), self.first_B.split(count), strict=True):
            yield ((B.float() @ A).mul_(-self.scale).add_(some),)

    @classmethod
    def exported_sizes(
        cls, out_features: int, in_features: int, rank: int
    ) -> dict[str, tuple[int, ...]]:
        return cls.sizes(out_features, in_features, 2 * rank)

    @torch.no_grad()
    def load_fresh(self, A: Tensor, B: Tensor) -> None:
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)

    def original_output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        low = x @ self.first_A.to(x.dtype).T
        return self.base_output(x, residual) + self.scale * (low @ self.first_B.to(x.dtype).T)

    def exported(self) -> dict[str, Tensor]:
        return {
            "lora_A": torch.cat([self.lora_A, -self.first_A]),
            "lora_B": torch.cat([self.lora_B, self.first_B], dim=1),
        }

    @torch.no_grad()
    def why_not(self, parts: dict[str, Tensor]) -> str | None:
        """Codes hold the rest beside their own first directions, and beside no others."""
        if self.weight is not None or self._is_near(parts):
            return None
        return (
            "PiSSA's first directions are not this model's: the base or --svd_niter is another, or "
            "an earlier version drew them on a GPU; load the base it was trained on with the same "
            "--svd_niter, or merge the adapter and begin a new one"
        )

    @torch.no_grad()
    def load(self, parts: dict[str, Tensor]) -> None:
        (A, first_A), (B, first_B) = self._split(parts)
        if self.weight is not None:
            count = rows_at_once(self.in_features)
            parts_of_rows = (t.split(count) for t in (self.weight, self.first_B, first_B))
            for some, own, other in zip(*parts_of_rows, strict=True):
                change = own.float() @ self.first_A.float() + other.float() @ first_A.float()
                some.copy_(some + self.scale * change)
            self.first_A.copy_(-first_A)
            self.first_B.copy_(first_B)
        self.load_fresh(A, B)

    def _split(self, parts: dict[str, Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """A and -A_0, B and B_0, on this layer's device."""
        A, B, rank = parts["lora_A"], parts["lora_B"], self.lora_A.shape[0]
        return A.to(self.lora_A.device).split(rank), B.to(self.lora_B.device).split(rank, dim=1)

    def _is_near(self, parts: dict[str, Tensor]) -> bool:
        """Whether |B_0 A_0 - B_0' A_0'| <= NEAR |B_0 A_0|, where the primed are those of `parts`.

        Without a matrix [out, in]: |B A|^2 is the sum of B^T B times A A^T, element by element.
        """
        (_, first_A), (_, first_B) = self._split(parts)
        A = torch.cat([self.first_A, first_A]).double()
        B = torch.cat([self.first_B, first_B], dim=1).double()
        squares, own = (B.T @ B) * (A @ A.T), len(self.first_A)
        return bool(squares.sum() <= NEAR**2 * squares[:own, :own].sum())


def is_randomized(sides: Sequence[int], rank: int, power: int) -> bool:
    """Whether power iterations find the directions; at larger ranks the exact SVD is as cheap."""
    return power > 0 and 4 * rank < min(sides)


def _principal(weight: Tensor, rank: int, power: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], float32: their product is the weight's best of that rank."""
    if is_randomized(weight.shape, rank, power):
        U, S, Vt = _randomized_svd(weight, rank, power)
    else:
        U, S, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
        U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
    return S.sqrt().unsqueeze(1) * Vt, U * S.sqrt()


def _randomized_svd(weight: Tensor, rank: int, power: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, rank], S [rank] and V^T [rank, in], the same on every device but for rounding.

    Singular values of trained weights lie so densely that the directions which are found hang on
    the matrix that the iterations start from. It is drawn on the CPU, and as torch.svd_lowrank
    draws it there after torch.manual_seed(0).

    The weight is widened to float32 a slice at a time.

    Source: Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    slices = weight.split(rows_at_once(weight.shape[1]))

    def out_of(x: Tensor) -> Tensor:
        """W x, [in, rank] -> [out, rank]."""
        return torch.cat([some.float() @ x for some in slices])

    def back(x: Tensor) -> Tensor:
        """W^T x, [out, rank] -> [in, rank]."""
        total = x.new_zeros(weight.shape[1], x.shape[1])
        for some, part in zip(slices, x.split(len(slices[0])), strict=True):
            total.addmm_(some.float().T, part)
        return total

    is_tall = weight.shape[0] >= weight.shape[1]
    to_long, to_short = (out_of, back) if is_tall else (back, out_of)
    draw = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(min(weight.shape), rank, generator=draw, device="cpu")
    basis = torch.linalg.qr(to_long(start.to(weight.device))).Q
    for _ in range(power):
        basis = torch.linalg.qr(to_short(basis)).Q
        basis = torch.linalg.qr(to_long(basis)).Q
    U, S, Vt = torch.linalg.svd(to_short(basis).T, full_matrices=False)
    U = basis @ U
    return (U, S, Vt) if is_tall else (Vt.T, S, U.T)
