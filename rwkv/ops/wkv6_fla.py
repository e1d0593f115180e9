"""wkv6 through flash-linear-attention's chunked Triton kernels.

fla wants the decay as its natural log and the state as [Q, H, key, value]; both are turned here,
so no caller ever sees fla's layout. What it cannot run is the same as for wkv7.
"""

import torch
from torch import Tensor

from rwkv.ops.wkv7_fla import why_not

__all__ = ["run", "why_not"]

BEYOND = 4.4  # from here on a step keeps less than 1e-35; fla's sums of log decays stay finite


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
    from fla.ops.rwkv6 import chunk_rwkv6

    y, state = chunk_rwkv6(
        r=r,
        k=k,
        v=v,
        w=-torch.exp(w.float().clamp(max=BEYOND)),
        u=u,
        scale=1.0,
        initial_state=state.mT.contiguous(),
        output_final_state=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )
    return y, state.mT
