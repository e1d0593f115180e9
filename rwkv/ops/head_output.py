"""From what wkv read to the input of the output projection: group norm, bonus and gate.

    out = (norm(y) + bonus v) gate        the norm a head's; in RWKV-6 without bonus, silu(gate)

Source: RWKV-7 "Goose", arXiv:2503.14456; "Eagle and Finch", arXiv:2404.05892.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from rwkv.ops import fused


def fits_kernels(N: int) -> bool:
    """Whether the kernels that work by heads handle this head size."""
    return N in (16, 32, 64, 128, 256)


def head_output7(y: Tensor, norm: nn.GroupNorm, bonus: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """(norm(y) + bonus v) gate.

    The kernel keeps its arguments for the backward pass: in bfloat16 6 bytes a token and channel,
    of which wkv7 keeps v anyway, and 4 bytes a token and head.

    Args:
        y, v: [B, T, H, N].
        norm: of H groups.
        bonus: [B, T, H].
        gate: [B, T, C].

    Returns:
        [B, T, C].
    """
    if fits_kernels(y.shape[-1]) and fused.uses_kernels(gate, norm.weight):
        from rwkv.ops.head_output_triton import head_output as run

        return run(y, norm, bonus, v, gate)
    return (_normed(y, norm) + (bonus.unsqueeze(-1) * v).flatten(-2)) * gate


def head_output6(y: Tensor, norm: nn.GroupNorm, gate: Tensor) -> Tensor:
    """norm(y) silu(gate); otherwise as head_output7. The kernel keeps y and gate."""
    if fits_kernels(y.shape[-1]) and fused.uses_kernels(gate, norm.weight):
        from rwkv.ops.head_output_triton import head_output as run

        return run(y, norm, None, None, gate)
    return _normed(y, norm) * F.silu(gate)


def _normed(y: Tensor, norm: nn.GroupNorm) -> Tensor:
    B, T, H, N = y.shape
    return norm(y.reshape(B * T, H * N)).view(B, T, H * N)
