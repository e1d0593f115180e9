"""The wkv6 operator: RWKV-6's recurrence over one layer's heads.

    y_t = (S_{t-1} + v_t (u * k_t)^T) r_t
    S_t = S_{t-1} diag(d_t) + v_t k_t^T,    d_t = exp(-exp(w_t))

B rows of T tokens, Q sequences (Q = B unless packed), H heads of N channels.
Source: "Eagle and Finch: RWKV with matrix-valued states and dynamic recurrence", arXiv:2404.05892.
"""

import torch
from torch import Tensor

from rwkv.ops.backends import backend_module
from rwkv.ops.packing import check_packing

BACKENDS = {
    "cuda": "rwkv.ops.wkv6_cuda",
    "triton": "rwkv.ops.wkv6_triton",
    "fla": "rwkv.ops.wkv6_fla",
    "torch": "rwkv.ops.wkv6_torch",
    "reference": "rwkv.ops.wkv6_reference",
}


def wkv6(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T tokens and return the outputs and the state after them.

    The tensors are keyword-only: four of one shape are too easy to swap.

    Args:
        r, k, v: receptance, key and value, each [B, T, H, N]. Every input is read in v's dtype;
            under autocast they may arrive in several.
        w: decay before its double exponential, [B, T, H, N]; a step keeps exp(-exp(w)) of the
            state, a share in (0, 1). RWKV-6 gives any w.
        u: bonus of the current token, [H, N]; `time_faaaa` of the files.
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
    inputs = {"r": r, "w": w, "k": k, "v": v}
    for name, tensor in inputs.items():
        if tensor.shape != r.shape or tensor.ndim != 4 or tensor.shape[1] == 0:
            raise ValueError(
                f"wkv6: {name} is {list(tensor.shape)}, not [B, T, H, N] like r {list(r.shape)}"
                " with T > 0"
            )
    B, T, H, N = r.shape
    if u.shape != (H, N):
        raise ValueError(f"wkv6: u is {list(u.shape)}, expected [H, N] = {[H, N]}")
    Q = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens is not None:
        check_packing("wkv6", cu_seqlens, B, T)
    work = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = torch.zeros(Q, H, N, N, device=v.device, dtype=work)
    elif state.shape != (Q, H, N, N):
        raise ValueError(
            f"wkv6: state is {list(state.shape)}, expected [Q, H, N, N] = {[Q, H, N, N]}"
        )
    module = backend_module("wkv6", BACKENDS, backend, v, cu_seqlens is not None)
    with torch.autocast(v.device.type, enabled=False):  # the backends choose their own precision
        return module.run(
            **{name: tensor.to(v.dtype) for name, tensor in inputs.items()},
            u=u.to(v.dtype),
            state=state.to(work),
            cu_seqlens=cu_seqlens,
        )
