"""wkv7 in plain torch, one step at a time: slow, differentiable, and the oracle of every test.

It computes in float32, or in float64 where the inputs are (for gradcheck).
"""

import torch
from torch import Tensor

from rwkv.ops.packing import text_lengths


def why_not(sample: Tensor, packed: bool) -> str | None:
    return None


def run(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return _one(r, w, k, v, a, b, state)
    lengths = text_lengths(cu_seqlens)
    texts = zip(*(t.split(lengths, dim=1) for t in (r, w, k, v, a, b)), state.split(1), strict=True)
    ys, states = zip(*(_one(*text) for text in texts), strict=True)
    return torch.cat(ys, dim=1), torch.cat(states)


def _one(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = v.dtype
    r, w, k, v, a, b = (t.to(S.dtype) for t in (r, w, k, v, a, b))
    kept = torch.exp(-torch.exp(w))  # [B, T, H, N]
    ys = []
    for t in range(r.shape[1]):
        read = S @ a[:, t].unsqueeze(-1)  # [B, H, N, 1]
        S = (
            S * kept[:, t].unsqueeze(-2)
            + read @ b[:, t].unsqueeze(-2)
            + v[:, t].unsqueeze(-1) @ k[:, t].unsqueeze(-2)
        )
        ys.append((S @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, dim=1).to(dtype), S
