"""The wkv7 operator: RWKV-7's recurrence over one layer's heads.

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,    d_t = exp(-exp(w_t))
    y_t = S_t r_t

B rows of T tokens, Q sequences (Q = B unless packed), H heads of N channels.
Source: RWKV-7 "Goose", arXiv:2503.14456.
"""

import torch
from torch import Tensor

from rwkv.ops.backends import backend_module
from rwkv.ops.packing import check_packing

BACKENDS = {
    "cuda": "rwkv.ops.wkv7_cuda",
    "triton": "rwkv.ops.wkv7_triton",
    "fla": "rwkv.ops.wkv7_fla",
    "torch": "rwkv.ops.wkv7_torch",
    "reference": "rwkv.ops.wkv7_reference",
}


def wkv7(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T tokens and return the outputs and the state after them.

    The tensors are keyword-only: six of one shape are too easy to swap.

    Args:
        r, k, v: receptance, key and value, each [B, T, H, N]. Every input is read in v's dtype;
            under autocast they may arrive in several.
        w: decay before its double exponential, [B, T, H, N]; a step keeps exp(-exp(w)) of the
            state, a share in (0, 1). RWKV-7 gives w <= -0.5, and the GPU kernels may
            rely on it.
        a: direction read from the state, [B, T, H, N]; RWKV-7 passes -kk.
        b: direction written back, [B, T, H, N]; RWKV-7 passes kk * iclr.
        state: S_0 of each sequence, [Q, H, N, N], values on rows and keys on columns, float32,
            the layout of `time_state` in .pth files; None for zeros.
        cu_seqlens: for Q texts packed end to end into B = 1: where each starts, and T, [Q + 1],
            int64, as in FlashAttention.
        backend: a key of BACKENDS, or "auto" for the first that can run and is not known to be
            slow.

    Returns:
        y: [B, T, H, N], in v's dtype.
        state: S_T of each sequence, [Q, H, N, N], float32 (float64 if v is). Gradients flow
            through both.

    Raises:
        ValueError: shapes disagree, or `backend` is unknown.
        RuntimeError: the backend cannot run on this device, dtype or shape.
    """
    inputs = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
    for name, tensor in inputs.items():
        if tensor.shape != r.shape or tensor.ndim != 4 or tensor.shape[1] == 0:
            raise ValueError(
                f"wkv7: {name} is {list(tensor.shape)}, not [B, T, H, N] like r {list(r.shape)}"
                " with T > 0"
            )
    B, T, H, N = r.shape
    Q = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens is not None:
        check_packing("wkv7", cu_seqlens, B, T)
    work = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = torch.zeros(Q, H, N, N, device=v.device, dtype=work)
    elif state.shape != (Q, H, N, N):
        raise ValueError(
            f"wkv7: state is {list(state.shape)}, expected [Q, H, N, N] = {[Q, H, N, N]}"
        )
    module = backend_module("wkv7", BACKENDS, backend, v, cu_seqlens is not None)
    with torch.autocast(v.device.type, enabled=False):  # the backends choose their own precision
        return module.run(
            **{name: tensor.to(v.dtype) for name, tensor in inputs.items()},
            state=state.to(work),
            cu_seqlens=cu_seqlens,
        )
