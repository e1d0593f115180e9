"""What stands in front of a block's projections: layer norm, token shift and mixes.

    n_t = norm(x_t),    x_t^(i) = n_t + (n_(t-1) - n_t) * mix_i

Source: RWKV-7 "Goose", arXiv:2503.14456; "Eagle and Finch", arXiv:2404.05892, section 4.2, where
the mixes of the time mix follow the data.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkv.ops import fused
from rwkv.ops.low_rank import low_rank
from rwkv.token_shift import last_token, token_shift

WIDEST = 8192  # channels: what a program still holds in registers
WIDEST_RANK = 128  # of the products that move mixes by data


def norm_shift_mix(
    x: Tensor,
    norm: nn.LayerNorm,
    shift: Tensor,
    mixes: Sequence[Tensor],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Mix each token's norm with that of the token before it.

    The kernel keeps x for the backward pass, 2 bytes a token and channel in bfloat16, and 8 bytes a
    token; no normed tensor.

    Args:
        x: the stream, [B, T, C].
        norm: the layer norm in front of the mixes.
        shift: the normed token before each sequence's first, [Q, C].
        mixes: the share of the token before, one [C] (with any sides of 1) for each result.
        cu_seqlens: for packed texts, [Q + 1]; see wkv7.

    Returns:
        stream: x. What is added to it belongs to this one: its gradient then comes through here
            and is not added to that of the mixes in a pass of its own.
        mixed: one [B, T, C] for each mix.
        last: each sequence's last normed token, [Q, C].
    """
    if x.shape[-1] > WIDEST or not fused.uses_kernels(x, norm.weight, *mixes):
        normed = norm(x)
        before = token_shift(normed, shift, cu_seqlens) - normed
        mixed = tuple(torch.addcmul(normed, before, mix) for mix in mixes)
        return x, mixed, last_token(normed, cu_seqlens)
    from rwkv.ops.norm_mix_triton import norm_shift_mix as run

    return run(x, norm, shift, mixes, cu_seqlens)[:3]


def norm_shift_mix_by_data(
    x: Tensor,
    norm: nn.LayerNorm,
    shift: Tensor,
    mix: Tensor,
    low: Tensor,
    high: Tensor,
    mixes: Sequence[Tensor],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """As `norm_shift_mix`, with M mixes that each move by delta_i = tanh(x^(mix) low)_i high_i.

    The kernels keep x for the backward pass, 2 bytes a token and channel in bfloat16, and 8 bytes a
    token; the products of low rank keep the input of the first, 2 bytes more, and tanh.

    Args:
        mix: for the input of the low-rank product, [C].
        low: [C, M * rank].
        high: [M, rank, C].
        mixes: what the deltas are added to, M of [C].
    """
    M, rank, C = high.shape
    fits = C <= WIDEST and rank <= WIDEST_RANK
    if not (fits and fused.uses_kernels(x, norm.weight, mix, low, high, *mixes)):
        normed = norm(x)
        before = token_shift(normed, shift, cu_seqlens) - normed
        lower = torch.tanh(low_rank(torch.addcmul(normed, before, mix), low)[0])
        deltas = torch.bmm(lower.view(-1, M, rank).transpose(0, 1), high)
        mixed = tuple(
            torch.addcmul(normed, before, base + delta.view_as(x))
            for base, delta in zip(mixes, deltas, strict=True)
        )
        return x, mixed, last_token(normed, cu_seqlens)
    from rwkv.ops.mixes_by_data_triton import mixes_by_data
    from rwkv.ops.norm_mix_triton import norm_shift_mix as run

    x, (inner,), last, unmade = run(x, norm, shift, [mix], cu_seqlens)
    lower = torch.tanh(low_rank(inner, low)[0])
    return x, mixes_by_data(x, norm, shift, lower, high, mixes, unmade), last
