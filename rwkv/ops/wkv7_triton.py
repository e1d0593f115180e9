"""wkv7 in Triton for Hopper GPUs: chunks of tokens on tensor cores, with parallelism over time.

Forward: `prepare_kernel` makes each chunk's affine map of the state, all chunks at once;
`scan_kernel` runs the states through these maps, one matrix product a chunk, value rows in
parallel, and makes the outputs. Backward: `reverse_scan_kernel` runs the gradient of the state
back through the same maps; `gradient_kernel` makes all input gradients, all chunks at once.
No atomics: results are the same in every run.

Nothing is kept for backward beside the inputs: states, maps, readouts and inverses would be 11
bytes per token and channel and more, and running the forward kernels again takes less time than
chunks long enough to keep less.

Requires w <= -0.5, as RWKV-7 guarantees. Up to w = 0.9 the result is still right (the factors of
half a chunk stay within float32); beyond that it is not defined.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from rwkv.keeper import keeping
from rwkv.ops import triton_chunks
from rwkv.ops.kept import gradients_of_states, register_gradient
from rwkv.ops.packing import count_slots
from rwkv.ops.triton_chunks import slot_owners
from rwkv.ops.wkv7_triton_kernels import (
    gradient_kernel,
    prepare_kernel,
    reverse_scan_kernel,
    scan_kernel,
)

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32

ALL_REGISTERS = {"maxnreg": 255} if triton_chunks.NVIDIA.value else {}  # others have no such option
# Chunk length and launch of each kernel, by dtype and head size. V is the number of value rows a
# program of a scan owns: at 64 no more than 16, for smaller heads take the settings of 64.
LAUNCH: dict[tuple[torch.dtype, int], dict[str, Any]] = {
    (BFLOAT16, 64): {
        "C": 32,
        "prepare": {"num_warps": 2},
        "scan": {"V": 16, "num_warps": 1, "STAGES": 2},
        "reverse": {"V": 16, "num_warps": 1, "STAGES": 2},
        "gradient": {"num_warps": 4},
    },
    (BFLOAT16, 128): {
        "C": 32,
        "prepare": {"num_warps": 4},
        "scan": {"V": 32, "num_warps": 4, "STAGES": 2},
        "reverse": {"V": 32, "num_warps": 4, "STAGES": 2},
        "gradient": {"num_warps": 8},
    },
    (FLOAT32, 64): {
        "C": 16,
        "prepare": {"num_warps": 4},
        "scan": {"V": 16, "num_warps": 4, "STAGES": 2},
        "reverse": {"V": 16, "num_warps": 4, "STAGES": 2},
        "gradient": {"num_warps": 8, **ALL_REGISTERS},
    },
    (FLOAT32, 128): {
        "C": 16,
        "prepare": {"num_warps": 4},
        "scan": {"V": 16, "num_warps": 8, "STAGES": 2},
        "reverse": {"V": 16, "num_warps": 4, "STAGES": 2},
        "gradient": {"num_warps": 8, **ALL_REGISTERS},
    },
}
# Bytes of shared memory of a block, where a kernel takes more than the 99 KiB that all GPUs have;
# tests/triton_probe.py has them from the compiler.
SHARED = {(BFLOAT16, 128): 141_312, (FLOAT32, 128): 180_224}
# Operands of matrix products: WIDE where a factor may be 2^28, FINE where tiles are scaled to 1.
DTYPES = {
    BFLOAT16: {"WIDE": tl.bfloat16, "FINE": tl.float16},
    FLOAT32: {"WIDE": tl.float32, "FINE": tl.float32},
}


def why_not(sample: Tensor, packed: bool) -> str | None:
    return triton_chunks.why_not(sample, SHARED.get((sample.dtype, sample.shape[-1]), 0))


def why_slow(sample: Tensor, packed: bool) -> str | None:
    if sample.dtype == FLOAT32 and sample.shape[-1] > 64:
        return (
            "takes a third more time than plain torch in float32 at heads of 128, measured on sm_90"
        )
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
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, state)]
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(r.device, non_blocking=True)
    y, final, *_ = _forward(*inputs, cu_seqlens, False)
    return y, final


def _launch(r: Tensor) -> dict[str, Any]:
    N = int(r.shape[-1])  # a number also where torch traces with symbols for sizes
    return LAUNCH[r.dtype, max(N, 64)]


def _fine(r: Tensor) -> torch.dtype:
    return torch.float16 if r.dtype == BFLOAT16 else FLOAT32


@torch.library.custom_op("rwkv::wkv7_triton", mutates_args=())
@keeping
def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, S_T and what `_backward` wants of all chunks: states, M, R, X and L_C.

    The last is empty where X holds it; without `keep` all are.
    """
    B, T, H, N = r.shape
    launch, fine = _launch(r), _fine(r)
    C, scan = launch["C"], launch["scan"]
    slots = count_slots(B, T, cu_seqlens, C)
    y, final = torch.empty_like(r), torch.empty_like(state)
    transition = r.new_empty(slots, H, N, N, dtype=fine)
    drive = torch.empty_like(transition)
    readout = r.new_empty(slots, H, C, N, dtype=fine)
    decay = r.new_empty(slots, H, N, dtype=FLOAT32)
    powers = r.new_empty(slots, H, 2, dtype=FLOAT32)
    inverse = r.new_empty((slots, H, C, C) if keep else 0, dtype=fine)
    states = r.new_empty((slots, H, N, N) if keep else 0, dtype=fine)
    with torch.cuda.device_of(r):
        prepare_kernel[(slots * H,)](
            *(r, w, k, v, a, b, y, transition, drive, readout, inverse, decay, powers),
            *(slot_owners(cu_seqlens, slots, C), cu_seqlens, T, H),
            N=N,
            C=C,
            **DTYPES[r.dtype],
            KEEP=keep,
            **launch["prepare"],
        )
        scan_kernel[(state.shape[0] * H * (N // scan["V"]),)](
            *(state, transition, drive, readout, decay, powers, y, states, inverse, final),
            *(cu_seqlens, T, H),
            N=N,
            C=C,
            **DTYPES[r.dtype],
            KEEP=keep,
            **scan,
        )
    if not keep:
        transition, readout = transition.new_empty(0), readout.new_empty(0)
    if not keep or C >= N:
        decay = decay.new_empty(0)
    return y, final, states, transition, readout, inverse, decay


@_forward.register_fake
def _(r, w, k, v, a, b, state, cu_seqlens, keep):
    B, T, H, N = r.shape
    C, fine = _launch(r)["C"], _fine(r)
    slots = count_slots(B, T, cu_seqlens, C)
    square = (slots, H, N, N) if keep else (0,)
    return (
        torch.empty_like(r),
        torch.empty_like(state),
        r.new_empty(square, dtype=fine),
        r.new_empty(square, dtype=fine),
        r.new_empty((slots, H, C, N) if keep else (0,), dtype=fine),
        r.new_empty((slots, H, C, C) if keep else (0,), dtype=fine),
        r.new_empty((slots, H, N) if keep and C < N else (0,), dtype=FLOAT32),
    )


@torch.library.custom_op("rwkv::wkv7_triton_backward", mutates_args=())
def _backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    grad_y: Tensor,
    grad_final: Tensor | None,
    states: Tensor,
    transition: Tensor,
    readout: Tensor,
    inverse: Tensor,
    decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of r, w, k, v, a, b and of the initial state."""
    T, H, N = r.shape[1:]
    slots, _, C, _ = readout.shape
    grad_final, grad_initial = gradients_of_states(grad_final, r, cu_seqlens)
    grad_states = torch.empty_like(states)
    dr, dw, dk, dv, da, db = (torch.empty_like(r) for _ in range(6))
    launch = _launch(r)
    scan, reverse = launch["scan"], launch["reverse"]
    grad_powers = r.new_empty(slots, H, N // reverse["V"], dtype=FLOAT32)
    with torch.cuda.device_of(r):
        reverse_scan_kernel[(grad_final.shape[0] * H * (N // reverse["V"]),)](
            *(grad_final, transition, readout, inverse, decay),
            *(grad_y, grad_states, grad_powers, grad_initial, cu_seqlens, T, H),
            N=N,
            C=C,
            FINE=DTYPES[r.dtype]["FINE"],
            **reverse,
        )
        gradient_kernel[(slots * H,)](
            *(r, w, k, v, a, b, grad_y, states, grad_states, grad_powers, inverse),
            *(dr, dw, dk, dv, da, db),
            *(slot_owners(cu_seqlens, slots, C), cu_seqlens, T, H),
            N=N,
            C=C,
            **DTYPES[r.dtype],
            V=scan["V"],
            GRAD_V=reverse["V"],
            **launch["gradient"],
        )
    return dr, dw, dk, dv, da, db, grad_initial


@_backward.register_fake
def _(
    r, w, k, v, a, b, cu_seqlens, grad_y, grad_final, states, transition, readout, inverse, decay
):
    return (
        *(torch.empty_like(r) for _ in range(6)),
        gradients_of_states(grad_final, r, cu_seqlens)[1],
    )


register_gradient(_forward, _backward)
