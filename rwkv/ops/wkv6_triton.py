"""wkv6 in Triton for Hopper GPUs: chunks of tokens on tensor cores, with parallelism over time.

Forward: `drive_kernel` makes what each chunk adds to the state, all chunks at once; `scan_kernel`
sums that up from chunk to chunk, element by element; `output_kernel` makes the outputs, again all
chunks at once. Backward: the first two kernels carry the gradient of the state back, and
`gradient_kernel` makes all input gradients, all chunks at once. No atomics: results are the same
in every run. Right for any finite w.

Kept for backward beside the inputs at N = 64 in bfloat16: the states before the chunks, 4 bytes
per token and channel. At N = 128 and in float32 they would be 8 and more, so nothing is kept and
backward makes them again. Without gradients nothing is kept.
"""

from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from rwkv.keeper import keeping
from rwkv.ops import triton_chunks
from rwkv.ops.kept import gradients_of_states
from rwkv.ops.packing import count_slots
from rwkv.ops.triton_chunks import slot_owners
from rwkv.ops.wkv6_triton_kernels import (
    drive_kernel,
    gradient_kernel,
    output_kernel,
    scan_kernel,
)

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32

# Chunk length and launch of each kernel, by dtype and head size. V is the number of value rows a
# program of the scan owns, K that of key columns that are worked on at a time.
# In bfloat16 at N = 128 the gradient with K = 32 would spill less, but ptxas 12.8, which Triton 3.6
# and 3.7 bring, then gives tensor cores wrong addresses in all but 16 rows of a tile; 12.9 is
# right. With one stage two programs fit on a multiprocessor.
LAUNCH: dict[tuple[torch.dtype, int], dict[str, Any]] = {
    (BFLOAT16, 64): {
        "C": 32,
        "V": 16,
        "drive": {"num_warps": 2},
        "scan": {"num_warps": 1, "STAGES": 4},
        "output": {"num_warps": 2, "K": 64},
        "gradient": {"num_warps": 4, "K": 64},
    },
    (BFLOAT16, 128): {
        "C": 32,
        "V": 16,
        "drive": {"num_warps": 2},
        "scan": {"num_warps": 2, "STAGES": 4},
        "output": {"num_warps": 2, "K": 32},
        "gradient": {"num_warps": 4, "K": 64, "num_stages": 1},
    },
    (FLOAT32, 64): {
        "C": 16,
        "V": 16,
        "drive": {"num_warps": 4},
        "scan": {"num_warps": 1, "STAGES": 4},
        "output": {"num_warps": 2, "K": 64},
        "gradient": {"num_warps": 4, "K": 64},
    },
    (FLOAT32, 128): {
        "C": 16,
        "V": 16,
        "drive": {"num_warps": 4},
        "scan": {"num_warps": 2, "STAGES": 4},
        "output": {"num_warps": 4, "K": 64},
        "gradient": {"num_warps": 4, "K": 64},
    },
}
# Operands of matrix products: WIDE where a factor may be 2^LIMIT, FINE where tiles are scaled to 1.
DTYPES = {
    BFLOAT16: {"WIDE": tl.bfloat16, "FINE": tl.float16},
    FLOAT32: {"WIDE": tl.float32, "FINE": tl.float32},
}
# The most that the decay of half a leaf may be, in powers of two. It is far below what overflows:
# in the gradient of w the large terms of a leaf cancel, and a strong decay leaves little behind.
LIMITS = {BFLOAT16: 64.0, FLOAT32: 20.0}


def why_not(sample: Tensor, packed: bool) -> str | None:
    return triton_chunks.why_not(sample)


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
    keep = (
        r.dtype == BFLOAT16
        and r.shape[-1] <= 64
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
    )
    y, final, *_ = _forward(*inputs, cu_seqlens, keep)
    return y, final


def _launch(r: Tensor) -> dict[str, Any]:
    N = int(r.shape[-1])  # a number also where torch traces with symbols for sizes
    return LAUNCH[r.dtype, max(N, 64)]


def _blocked(options: dict[str, Any], N: int) -> dict[str, Any]:
    return options | {"K": min(options["K"], N)}


def _fine(r: Tensor) -> torch.dtype:
    return torch.float16 if r.dtype == BFLOAT16 else FLOAT32


@cache
def _matrices(C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrices that sum decays, [., C, C], by token t and token j.

    First that of sums of all j before t. Then those of sums of all j from the middle of t's leaf to
    before t, negative where t is the first, for leaves of C, C / 2, 1 and C / 4 tokens. Then those
    of sums between t and the middle of a block, without t, for halves of C / 2, C / 4 ... 1 tokens.
    """
    t = torch.arange(C)
    before = (t < t[:, None]).to(dtype)
    middles = [before - before[t // n * n + n // 2] for n in (C, C // 2, 1, C // 4)]
    halves = [C >> level for level in range(1, C.bit_length())]
    within = (((t ^ t[:, None]) < n) & ((t & n != 0)[:, None] == (t < t[:, None])) for n in halves)
    apart = t != t[:, None]
    with torch.inference_mode(False):
        return torch.stack([before, *middles, *(x & apart for x in within)]).to(device, dtype)


def _chunks(r: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """The text of each slot; room for each chunk's L and facts."""
    C, (B, T, H, N) = _launch(r)["C"], r.shape
    slots = count_slots(B, T, cu_seqlens, C)
    return (
        slot_owners(cu_seqlens, slots, C),
        r.new_empty(slots, H, 2, N, dtype=FLOAT32),
        r.new_empty(slots, H, 3, dtype=FLOAT32),
    )


def _scan(
    x: Tensor,
    w: Tensor,
    z: Tensor,
    initial: Tensor,
    final: Tensor,
    decay: Tensor,
    facts: Tensor,
    owners: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Scan k, w and v into the states before the chunks, their powers of two, and `final`.

    In reverse r, w and dy into the gradients of the states after the chunks and of the first. The
    facts are filled in, and but for reverse `decay` with L.
    """
    T, H, N = x.shape[1:]
    launch, slots, fine = _launch(x), len(decay), _fine(x)
    C, V = launch["C"], launch["V"]
    drive = x.new_empty(slots, H, N, N, dtype=fine)
    states = torch.empty_like(drive)
    powers = x.new_empty(slots, H, N // V, dtype=FLOAT32)
    with torch.cuda.device_of(x):
        drive_kernel[(slots * H,)](
            *(x, w, z, _matrices(C, fine, x.device), drive, facts, decay, owners, cu_seqlens, T, H),
            N=N,
            C=C,
            FINE=DTYPES[x.dtype]["FINE"],
            LIMIT=LIMITS[x.dtype],
            REVERSE=reverse,
            **launch["drive"],
        )
        scan_kernel[(len(initial) * H * (N // V),)](
            *(initial, drive, facts, decay, states, powers, final, cu_seqlens, T, H),
            N=N,
            C=C,
            V=V,
            FINE=DTYPES[x.dtype]["FINE"],
            REVERSE=reverse,
            **launch["scan"],
        )
    return states, powers


@torch.library.custom_op("rwkv::wkv6_triton", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, S_T and what `_backward` wants of all chunks: L, facts, states and their powers.

    Without `keep` the last four are empty.
    """
    owners, decay, facts = _chunks(r, cu_seqlens)
    final = torch.empty_like(state)
    states, powers = _scan(k, w, v, state, final, decay, facts, owners, cu_seqlens, reverse=False)
    T, H, N = r.shape[1:]
    y, launch = torch.empty_like(r), _launch(r)
    with torch.cuda.device_of(r):
        output_kernel[(len(facts) * H,)](
            *(r, w, k, v, u, _matrices(launch["C"], _fine(r), r.device)),
            *(decay, facts, states, powers, y, owners, cu_seqlens, T, H),
            N=N,
            C=launch["C"],
            V=launch["V"],
            **DTYPES[r.dtype],
            **_blocked(launch["output"], N),
        )
    kept = decay, facts, states, powers
    return y, final, *(kept if keep else (x.new_empty(0) for x in kept))


@_forward.register_fake
def _(r, w, k, v, u, state, cu_seqlens, keep):
    B, T, H, N = r.shape
    launch = _launch(r)
    slots = count_slots(B, T, cu_seqlens, launch["C"])
    return (
        torch.empty_like(r),
        torch.empty_like(state),
        r.new_empty((slots, H, 2, N) if keep else (0,), dtype=FLOAT32),
        r.new_empty((slots, H, 3) if keep else (0,), dtype=FLOAT32),
        r.new_empty((slots, H, N, N) if keep else (0,), dtype=_fine(r)),
        r.new_empty((slots, H, N // launch["V"]) if keep else (0,), dtype=FLOAT32),
    )


@torch.library.custom_op("rwkv::wkv6_triton_backward", mutates_args=())
def _backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    grad_y: Tensor,
    grad_final: Tensor | None,
    decay: Tensor | None,
    facts: Tensor | None,
    states: Tensor | None,
    powers: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of r, w, k, v, u and of the initial state."""
    owners, L, grad_facts = _chunks(r, cu_seqlens)
    grad_final, grad_initial = gradients_of_states(grad_final, r, cu_seqlens)
    if decay is None or facts is None:
        decay, facts = L, torch.empty_like(grad_facts)
        final = torch.empty_like(state)
        states, powers = _scan(
            k, w, v, state, final, decay, facts, owners, cu_seqlens, reverse=False
        )
    grad_states, grad_powers = _scan(
        r, w, grad_y, grad_final, grad_initial, decay, grad_facts, owners, cu_seqlens, reverse=True
    )
    T, H, N = r.shape[1:]
    dr, dw, dk, dv = (torch.empty_like(r) for _ in range(4))
    slots = len(grad_facts)
    du, launch = r.new_empty(slots, H, N, dtype=FLOAT32), _launch(r)
    with torch.cuda.device_of(r):
        gradient_kernel[(slots * H,)](
            *(r, w, k, v, u, grad_y, _matrices(launch["C"], _fine(r), r.device)),
            *(decay, facts, states, powers),
            *(grad_facts, grad_states, grad_powers),
            *(dr, dw, dk, dv, du, owners, cu_seqlens, T, H),
            N=N,
            C=launch["C"],
            V=launch["V"],
            **DTYPES[r.dtype],
            **_blocked(launch["gradient"], N),
        )
    return dr, dw, dk, dv, du.sum(0).to(u.dtype), grad_initial


@_backward.register_fake
def _(r, w, k, v, u, state, cu_seqlens, grad_y, grad_final, decay, facts, states, powers):
    return tuple(torch.empty_like(x) for x in (r, w, k, v, u, state))


def _save(ctx, inputs, output):
    *_, cu_seqlens, keep = inputs
    y, final, *kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], cu_seqlens, *(kept if keep else [None] * 4))


def _differentiate(ctx, grad_y, grad_final, *_):
    saved = ctx.saved_tensors  # asked for once: checkpointing recomputes them at each asking
    grad_y = torch.zeros_like(saved[0]) if grad_y is None else grad_y.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    return *_backward(*saved[:7], grad_y, grad_final, *saved[7:]), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
