"""wkv6 in plain torch, one step at a time: slow, differentiable, and the oracle of every test.

It computes in float32, or in float64 where the inputs are (for gradcheck).
"""

import torch
from torch import Tensor

from rwkv.ops.packing import text_lengths

BEYOND = 80.0  # from here on exp(-exp(w)) is 0, and so is its gradient, also where exp(w) overflows


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
        return _one(r, w, k, v, state, u)
    lengths = text_lengths(cu_seqlens)
    texts = zip(*(t.split(lengths, dim=1) for t in (r, w, k, v)), state.split(1), strict=True)
    ys, states = zip(*(_one(r, w, k, v, S, u) for r, w, k, v, S in texts), strict=True)
    return torch.cat(ys, dim=1), torch.cat(states)


def _one(r: Tensor, w: Tensor, k: Tensor, v: Tensor, S: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.exp(-torch.exp(w.to(S.dtype).clamp(max=BEYOND)))
    # As columns over the state's rows (values) and rows over its columns (keys), step by step.
    columns = [x.to(S.dtype).unsqueeze(-1).unbind(1) for x in (r, v)]  # [B, H, N, 1]
    rows = [x.to(S.dtype).unsqueeze(-2).unbind(1) for x in (kept, k)]  # [B, H, 1, N]
    bonus, ys = u.to(S.dtype).unsqueeze(-2), []
    for r_t, v_t, kept_t, k_t in zip(*columns, *rows, strict=True):
        ys.append(((S + v_t @ (bonus * k_t)) @ r_t).squeeze(-1))
        S = S * kept_t + v_t @ k_t
    return torch.stack(ys, dim=1).to(v.dtype), S
