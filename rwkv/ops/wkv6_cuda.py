"""wkv6 in CUDA (cuda/wkv6.cu): chunks of 64 tokens on tensor cores, with parallelism over time.

Forward: `wkv6_scan` walks the states from chunk to chunk, key columns in parallel, and keeps those
before each; `wkv6_output` makes the outputs of all chunks at once. Backward: `wkv6_reverse` walks
the gradient of the state back, and `wkv6_gradient` makes the other gradients of all chunks at once.
Chunks with decays so strong that one point cannot serve all of it are left to kernels of their own
(`_steep`), which find them on the device. No atomics: results are the same in every run. Right for
any finite w.

Kept for backward beside the inputs, in bytes per token and channel: states 2, their exponents and
which chunks are steep 0.005. Without gradients nothing is kept.
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

PARTS = 4  # of 16 key columns, each with an exponent: cuda/wkv6.cu
ROW = 4 * C  # bytes of a float32 for each token or channel
OUTPUT_BYTES = 5 * TILE + 5 * ROW + 16  # of shared memory
STEEP_OUTPUT_BYTES = 8 * TILE + 5 * ROW + 16
SOURCE = "wkv6.cu"
GRADIENT_BYTES = 11 * TILE + 27 * ROW + 176
STEEP_BLOCKS = 263  # of a kernel that looks for steep chunks; odd, so that each sees all heads


class Kernels(NamedTuple):
    """The compiled kernels of one device; scans by the number of parts of a block."""

    scan: dict[int, cuda_build.Kernel]
    output: cuda_build.Kernel
    output_steep: cuda_build.Kernel
    reverse: dict[int, cuda_build.Kernel]
    gradient: cuda_build.Kernel
    gradient_steep: cuda_build.Kernel


@cache
def load_kernels(device: torch.device) -> Kernels:
    """Compile what is not compiled yet, and load it once a device."""
    library = cuda_build.load(SOURCE, {}, device)

    def scan(name: str) -> dict[int, cuda_build.Kernel]:
        stages = {n: STAGES * (TILE + n * 4096) + n * 544 for n in (1, PARTS)}
        return {n: library.kernel(name, "p" * 8 + "ii", size) for n, size in stages.items()}

    return Kernels(
        scan("wkv6_scan"),
        library.kernel("wkv6_output", "p" * 11 + "ii", OUTPUT_BYTES),
        library.kernel("wkv6_output_steep", "p" * 11 + "iii", STEEP_OUTPUT_BYTES),
        scan("wkv6_reverse"),
        library.kernel("wkv6_gradient", "p" * 18 + "ii", GRADIENT_BYTES),
        library.kernel("wkv6_gradient_steep", "p" * 18 + "iii", GRADIENT_BYTES),
    )


def why_not(sample: Tensor, packed: bool) -> str | None:
    return cuda_chunks.why_not(sample, SOURCE, GRADIENT_BYTES)


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
    inputs = [x.contiguous() for x in (r, w, k, v, u, state)]
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(r.device, non_blocking=True)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, final, *_ = _forward(*inputs, cu_seqlens, keep)
    return y, final


def _scan(
    kernels: dict[int, cuda_build.Kernel],
    inputs: tuple[Tensor, Tensor, Tensor],
    initial: Tensor,
    final: Tensor,
    cu_seqlens: Tensor | None,
    slots: int,
) -> tuple[Tensor, Tensor]:
    """The states on the side of each chunk where the scan comes from, and their exponents.

    The last ones are written to `final`.
    """
    T, H = inputs[0].shape[1:3]
    states = initial.new_empty(slots, H, N, N, dtype=torch.float16)
    exponents = initial.new_empty(slots, H, PARTS)
    heads = len(initial) * H
    parts = 1 if heads < cuda_chunks.FEW_HEADS else PARTS
    kernels[parts](
        *(heads * PARTS // parts, 128 * parts),
        *(*inputs, initial, states, exponents, final, cu_seqlens, T, H),
    )
    return states, exponents


@torch.library.custom_op("rwkv::wkv6_cuda", mutates_args=())
@keeping
def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, S_T and what `_backward` wants of all chunks, empty without `keep`: the states
    before them, their exponents, and which chunks are steep."""
    B, T, H, _ = r.shape
    slots = count_slots(B, T, cu_seqlens, C)
    kernels, owners = load_kernels(r.device), slot_owners(cu_seqlens, slots)
    final = torch.empty_like(state)
    states, exponents = _scan(kernels.scan, (k, w, v), state, final, cu_seqlens, slots)
    y, steep = torch.empty_like(r), r.new_empty(slots, H, dtype=torch.int32)
    given = (r, w, k, v, u, states, exponents, y, steep, owners, cu_seqlens)
    kernels.output(slots * H, 128, *given, T, H)
    kernels.output_steep(min(slots * H, STEEP_BLOCKS), 128, *given, slots, T, H)
    kept = states, exponents, steep
    if not keep:
        states, exponents, steep = (x.new_empty(0) for x in kept)
    return y, final, states, exponents, steep


@_forward.register_fake
def _(r, w, k, v, u, state, cu_seqlens, keep):
    B, T, H, _ = r.shape
    slots = count_slots(B, T, cu_seqlens, C)

    def kept(*shape: int, dtype: torch.dtype) -> Tensor:
        return r.new_empty((slots, H, *shape) if keep else (0,), dtype=dtype)

    return (
        torch.empty_like(r),
        torch.empty_like(state),
        kept(N, N, dtype=torch.float16),
        kept(PARTS, dtype=torch.float32),
        kept(dtype=torch.int32),
    )


@torch.library.custom_op("rwkv::wkv6_cuda_backward", mutates_args=())
def _backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    cu_seqlens: Tensor | None,
    grad_y: Tensor,
    grad_final: Tensor | None,
    states: Tensor,
    exponents: Tensor,
    steep: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of r, w, k, v, u and of the initial state."""
    T, H = r.shape[1:3]
    slots = len(states)
    kernels, owners = load_kernels(r.device), slot_owners(cu_seqlens, slots)
    grad_final, grad_initial = gradients_of_states(grad_final, r, cu_seqlens)
    grad_states, grad_exponents = _scan(
        kernels.reverse, (r, w, grad_y), grad_final, grad_initial, cu_seqlens, slots
    )
    dr, dw, dk, dv = (torch.empty_like(r) for _ in range(4))
    du = r.new_empty(slots, H, N, dtype=torch.float32)
    given = (
        *(r, w, k, v, u, grad_y, states, exponents, grad_states, grad_exponents),
        *(dr, dw, dk, dv, du, steep, owners, cu_seqlens),
    )
    kernels.gradient(slots * H, 256, *given, T, H)
    kernels.gradient_steep(min(slots * H, STEEP_BLOCKS), 256, *given, slots, T, H)
    return dr, dw, dk, dv, du.sum(0).to(u.dtype), grad_initial


@_backward.register_fake
def _(r, w, k, v, u, cu_seqlens, grad_y, grad_final, *kept):
    return (
        *(torch.empty_like(x) for x in (r, w, k, v, u)),
        gradients_of_states(grad_final, r, cu_seqlens)[1],
    )


register_gradient(_forward, _backward)
