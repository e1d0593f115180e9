"""Bone, as RWKV-LM-RLHF trains it: a block-affine update of the weight.

Other projects gave the name away: RWKV-PEFT and HF peft call this one "bat", and use "bone"
(later DiSHA, MiSS) for a plain [rank, out] update, which is mode "miss" here. HF peft's bat
indexes its blocks by the output, this one by the input, so their files do not fit each other.
Source: arXiv:2409.15371.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peft.adapter import AdapterLinear, check_rank
from rwkv.errors import InputError
from rwkv.linear import Linear, unread_output
from rwkv.ops.fused import uses_kernels


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

    def adapted_output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """base(x + z) + sum_j z_j in every output block, where z_j = x_j G_j^T.

        Equal to x (W + dW)^T without building dW: sum_j x_j (W_ij G_j + G_j)^T
        = sum_j z_j W_ij^T + sum_j z_j for output block i.
        """
        out: Tensor = _BlockAffine.apply(x, residual, self.bone, self, self.is_unread())
        return out


class _BlockAffine(torch.autograd.Function):
    """residual + base(x + z) + the sum of z's blocks in every output block, keeping x alone.

    With e the gradient of base(x + z)'s input and s the sum of the output gradient's blocks, the
    gradient of z_j is e_j + s, hence dG_j = (e_j + s)^T x_j and dx_j = e_j + (e_j + s) G_j. The
    terms with s are plain products of [n, rank] with all blocks at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        bone: Tensor,
        layer: BoneLinear,
        unread: bool,
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, bone)
        if unread:
            return unread_output(x, layer.out_features, residual)
        return layer.kept(lambda: _block_affine_output(x, residual, bone, layer))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bone = ctx.saved_tensors
        rows, G = x.reshape(-1, x.shape[-1]), bone.to(x.dtype)
        rank = G.shape[-1]
        g = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        inner = ctx.layer.gradient(g.view(grad.shape)).to(x.dtype).reshape(rows.shape)
        total = sum_of_blocks(g, rank)
        dx, d_bone = unmix(inner, total, rows, G)
        d_residual = grad if ctx.needs_input_grad[1] else None
        return dx.view(x.shape), d_residual, d_bone.to(bone.dtype), None, None


def _block_affine_output(
    x: Tensor, residual: Tensor | None, bone: Tensor, layer: BoneLinear
) -> Tensor:
    mixed, total = mix(x.reshape(-1, x.shape[-1]), bone.to(x.dtype))
    out = layer.product_beside(mixed.view(x.shape), residual)
    add_to_blocks(out.view(-1, layer.out_features), total)
    return out


def mix(rows: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """x + z [n, C] and the sum of z's blocks [n, rank], where z_j = x_j G_j^T.

    Args:
        rows: x, [n, C].
        G: [C / rank, rank, rank], of x's dtype.
    """
    if _has_kernels(rows, G):
        return _kernels().mix(rows, G)
    return _add_blocks(rows, G.mT), rows @ G.mT.reshape(-1, G.shape[-1])


def unmix(inner: Tensor, total: Tensor, rows: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x [n, C] and of G; see _BlockAffine.

    Args:
        inner: e, [n, C].
        total: s, [n, rank].
        rows, G: as for `mix`.
    """
    if _has_kernels(rows, G):
        return _kernels().unmix(inner, total, rows, G)
    rank = G.shape[-1]
    dx = _add_blocks(inner, G)
    dx.addmm_(total, G.transpose(0, 1).reshape(rank, -1))
    shared = (total.T @ rows).unflatten(1, (-1, rank)).transpose(0, 1)
    return dx, torch.baddbmm(shared, _blocks(inner, rank).mT, _blocks(rows, rank))


def add_to_blocks(out: Tensor, total: Tensor) -> None:
    """out [n, C] += total [n, rank] in every block of `rank` channels, in place."""
    if uses_kernels(out):
        from peft import block_sums_triton

        if total.shape[1] in block_sums_triton.RANKS and out.is_contiguous():
            block_sums_triton.add_to_blocks(out, total.contiguous())
            return
    out.unflatten(1, (-1, total.shape[1])).add_(total.unsqueeze(1))


def sum_of_blocks(rows: Tensor, rank: int) -> Tensor:
    """The sum [n, rank] of the blocks of `rank` channels of [n, C]."""
    if uses_kernels(rows):
        from peft import block_sums_triton

        if rank in block_sums_triton.RANKS:
            return block_sums_triton.sum_of_blocks(rows.contiguous(), rank)
    return rows.unflatten(1, (-1, rank)).sum(dim=1)


def _has_kernels(rows: Tensor, G: Tensor) -> bool:
    return uses_kernels(rows) and _kernels().fits(G)


def _kernels() -> ModuleType:
    return importlib.import_module("peft.bone_triton")


def _blocks(rows: Tensor, rank: int) -> Tensor:
    """The blocks of `rank` channels of [n, C], as a view [C / rank, n, rank]."""
    return rows.unflatten(1, (-1, rank)).transpose(0, 1)


def _add_blocks(rows: Tensor, G: Tensor) -> Tensor:
    """rows_j + rows_j G_j for each block j of channels, [n, C]."""
    out = rows.new_empty(rows.shape)
    blocks = _blocks(rows, G.shape[-1])
    torch.baddbmm(blocks, blocks, G, out=_blocks(out, G.shape[-1]))
    return out


def _nearest_divisor(out_features: int, in_features: int, rank: int) -> int:
    """The common divisor of both sides that is nearest to `rank`."""
    fitting = (n for n in range(1, 2 * rank) if not (in_features % n or out_features % n))
    return min(fitting, key=lambda n: abs(n - rank))
