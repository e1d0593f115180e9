"""wkv7 in CUDA (cuda/wkv7.cu): chunks of 64 tokens on tensor cores, with parallelism over time.

Forward: `wkv7_prepare` makes each chunk's affine map of the state, all chunks at once; `wkv7_scan`
runs the states through these maps, value rows in parallel, and makes the outputs. Backward:
`wkv7_reverse` runs the gradient of the state back through the same maps; `wkv7_gradient` makes all
input gradients, all chunks at once. No atomics: results are the same in every run.

Kept for backward beside the inputs, in bytes per token and channel: states 2, maps 2, readout 2,
inverse 1.25, scales 0.13. Without gradients nothing is kept.

Requires w <= -0.5, as RWKV-7 guarantees. Up to w = 0.9 the result is still right (the factors of
half a chunk stay within float32); beyond that it is not defined.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv.keeper import keeping
from rwkv.ops import cuda_build, cuda_chunks
from rwkv.ops.cuda_chunks import STAGES, TILE, C, N, slot_owners
from rwkv.ops.kept import gradients_of_states, register_gradient
from rwkv.ops.packing import count_slots

SOURCE = "wkv7.cu"
BLOCKS, SCALARS = 10 * 512, 68  # as there
SUMS = 4 * C * 4  # bytes of sums over each of four groups of rows, float32
PREPARE_BYTES = 11 * TILE + BLOCKS + SUMS + 128  # of shared memory
GRADIENT_BYTES = 12 * TILE + SUMS + 3 * C * 4 + 96


class Kernels(NamedTuple):
    """The compiled kernels of one device; scans by the number of warps of a block."""

    prepare: cuda_build.Kernel
    scan: dict[int, cuda_build.Kernel]
    reverse: dict[int, cuda_build.Kernel]
    gradient: cuda_build.Kernel


@cache
def load_kernels(device: torch.device) -> Kernels:
    """Compile what is not compiled yet, and load it once a device."""
    library = cuda_build.load(SOURCE, {}, device)

    def stage(warp: int, warps: int) -> int:
        return STAGES * (2 * TILE + 512 + warps * warp)

    return Kernels(
        library.kernel("wkv7_prepare", "p" * 14 + "ii", PREPARE_BYTES),
        {n: library.kernel("wkv7_scan", "p" * 10 + "ii", stage(4096, n)) for n in (1, 4)},
        {n: library.kernel("wkv7_reverse", "p" * 9 + "ii", stage(2048, n)) for n in (1, 4)},
        library.kernel("wkv7_gradient", "p" * 21 + "ii", GRADIENT_BYTES),
    )


def why_not(sample: Tensor, packed: bool) -> str | None:
    return cuda_chunks.why_not(sample, SOURCE, GRADIENT_BYTES)


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
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, final, *_ = _forward(*inputs, cu_seqlens, keep)
    return y, final


def _warps(sequences: int, H: int) -> int:
    return 1 if sequences * H < cuda_chunks.FEW_HEADS else 4


@torch.library.custom_op("rwkv::wkv7_cuda", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, S_T and what `_backward` wants of all chunks, empty without `keep`: states and
    their exponents, M, R, X and scalars."""
    B, T, H, _ = r.shape
    slots = count_slots(B, T, cu_seqlens, C)
    kernels, owners = load_kernels(r.device), slot_owners(cu_seqlens, slots)
    y, final = torch.empty_like(r), torch.empty_like(state)
    transition, drive, readout = (
        r.new_empty(slots, H, C, N, dtype=torch.float16) for _ in range(3)
    )
    scalars = r.new_empty(slots, H, SCALARS, dtype=torch.float32)
    inverse = r.new_empty((slots, H, BLOCKS // 2) if keep else (0,), dtype=torch.float16)
    states = r.new_empty((slots, H, N, N) if keep else (0,), dtype=torch.float16)
    exponents = r.new_empty((slots, H, N) if keep else (0,), dtype=torch.float32)
    kernels.prepare(
        *(slots * H, 8 * 32),
        *(r, w, k, v, a, b, y, transition, drive, readout, inverse if keep else None, scalars),
        *(owners, cu_seqlens, T, H),
    )
    warps = _warps(len(state), H)
    kernels.scan[warps](
        *(len(state) * H * 4 // warps, 32 * warps),
        *(state, transition, drive, readout, scalars, y),
        *((states, exponents) if keep else (None, None)),
        *(final, cu_seqlens, T, H),
    )
    if not keep:
        transition, readout, scalars = (x.new_empty(0) for x in (transition, readout, scalars))
    return y, final, states, exponents, transition, readout, inverse, scalars


@_forward.register_fake
def _(r, w, k, v, a, b, state, cu_seqlens, keep):
    B, T, H, _ = r.shape
    slots = count_slots(B, T, cu_seqlens, C)

    def kept(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return r.new_empty((slots, H, *shape) if keep else (0,), dtype=dtype)

    return (
        torch.empty_like(r),
        torch.empty_like(state),
        kept(N, N),
        kept(N, dtype=torch.float32),
        kept(N, N),
        kept(C, N),
        kept(BLOCKS // 2),
        kept(SCALARS, dtype=torch.float32),
    )


@torch.library.custom_op("rwkv::wkv7_cuda_backward", mutates_args=())
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
    exponents: Tensor,
    transition: Tensor,
    readout: Tensor,
    inverse: Tensor,
    scalars: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of r, w, k, v, a, b and of the initial state."""
    T, H = r.shape[1:3]
    grad_final, grad_initial = gradients_of_states(grad_final, r, cu_seqlens)
    slots, sequences = len(states), len(grad_final)
    kernels, owners = load_kernels(r.device), slot_owners(cu_seqlens, slots)
    grad_states, grad_exponents = torch.empty_like(states), torch.empty_like(exponents)
    dr, dw, dk, dv, da, db = (torch.empty_like(r) for _ in range(6))
    warps = _warps(sequences, H)
    kernels.reverse[warps](
        *(sequences * H * 4 // warps, 32 * warps),
        *(grad_final, transition, readout, scalars, grad_y),
        *(grad_states, grad_exponents, grad_initial, cu_seqlens, T, H),
    )
    kernels.gradient(
        *(slots * H, 8 * 32),
        *(r, w, k, v, a, b, grad_y, states, exponents, grad_states, grad_exponents),
        *(inverse, scalars, dr, dw, dk, dv, da, db, owners, cu_seqlens, T, H),
    )
    return dr, dw, dk, dv, da, db, grad_initial


@_backward.register_fake
def _(r, w, k, v, a, b, cu_seqlens, grad_y, grad_final, *kept):
    return (
        *(torch.empty_like(r) for _ in range(6)),
        gradients_of_states(grad_final, r, cu_seqlens)[1],
    )


register_gradient(_forward, _backward)
