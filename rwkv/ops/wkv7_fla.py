"""wkv7 through flash-linear-attention's chunked Triton kernels.

fla wants the decay as its natural log and the state as [Q, H, key, value]; both are turned here,
so no caller ever sees fla's layout.
"""

import math
from importlib.util import find_spec

import torch
from torch import Tensor

MISSING = next((name for name in ("triton", "fla") if find_spec(name) is None), None)
LARGEST = 256  # fla's kernels keep all keys of a head in one block
# The log decay that RWKV-7's w <= -0.5 allows; it licenses fla's fastest scheme, chunks of 64 on
# tensor cores, which is safe down to -2.6.
LOWEST = -1.01 * math.exp(-0.5)


def why_not(sample: Tensor, packed: bool) -> str | None:
    N = sample.shape[-1]
    if sample.device.type != "cuda":
        return f"needs a GPU, the tensors are on {sample.device}"
    if MISSING is not None:
        return f"needs the package {MISSING}; pip install triton fla-core"
    if sample.dtype not in (torch.bfloat16, torch.float16):
        return f"is made for bfloat16 and float16, the tensors are {sample.dtype}"
    if N > LARGEST:
        return f"has head sizes up to {LARGEST}, not {N}"
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
    from fla.ops.rwkv7 import chunk_rwkv7

    y, state = chunk_rwkv7(
        r=r,
        w=-torch.exp(w.float()),
        k=k,
        v=v,
        a=a,
        b=b,
        scale=1.0,
        initial_state=state.mT.contiguous(),
        output_final_state=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
        lower_bound=LOWEST,
    )
    return y, state.mT
