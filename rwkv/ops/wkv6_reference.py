"""wkv6 in plain torch, one step at a time: slow, differentiable, and the oracle of every test.

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
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return _one(r, w, k, v, u, state)
    lengths = text_lengths(cu_seqlens)
    texts = zip(*(t.split(lengths, dim=1) for t in (r, w, k, v)), state.split(1), strict=True)
    ys, states = zip(*(_one(*tensors, u, S) for *tensors, S in texts), strict=True)
    return torch.cat(ys, dim=1), torch.cat(states)


def _one(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    dtype = v.dtype
    r, w, k, v, u = (t.to(S.dtype) for t in (r, w, k, v, u))
    kept = torch.exp(-torch.exp(w))  # [B, T, H, N]
    ys = []
    for t in range(r.shape[1]):
        now = v[:, t].unsqueeze(-1) @ k[:, t].unsqueeze(-2)  # [B, H, N, N]
        ys.append(((S + now * u.unsqueeze(-2)) @ r[:, t].unsqueeze(-1)).squeeze(-1))
        S = S * kept[:, t].unsqueeze(-2) + now
    return torch.stack(ys, dim=1).to(dtype), S
