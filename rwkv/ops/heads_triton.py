"""What the fused kernels that work by heads share.

A program handles some rows of 256 channels, or of one head if that is wider. That is one warp,
eight channels a thread, and the sums over a head stay within it, so that no warp waits for another.
"""

import torch
import triton
import triton.language as tl

from rwkv.ops.fused import rows_a_program
from rwkv.ops.triton_chunks import narrow, widen


def head_grid(
    rows: int, H: int, N: int, device: torch.device, *, programs: int, most: int | None
) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid (row blocks, head blocks) and the sizes that a kernel takes.

    Args:
        rows, H, N: of the activations, [rows, H, N].
        device: on which the kernel runs.
        programs, most: as in `rows_a_program`.
    """
    heads = max(256 // N, 1)
    tiles = triton.cdiv(H, heads)
    count = rows_a_program(rows * tiles, device, programs, most)
    return (triton.cdiv(rows, count), tiles), {"count": count, "H": H, "N": N, "HEADS": heads}


@triton.jit
def head_tile(H: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr):
    """This program's channels [HEADS, N], which of them exist, and its heads [HEADS]."""
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channels = h[:, None] * N + tl.arange(0, N)[None, :]
    return channels, (h < H)[:, None], h


@triton.jit
def read(pointer, offsets, inside):
    """float32; zeros for a tensor that is not there."""
    if pointer is None:
        x = tl.zeros_like(offsets).to(tl.float32)
    else:
        x = widen(tl.load(pointer + offsets, mask=inside, other=0.0))
    return x


@triton.jit
def write(pointer, offsets, x, inside):
    """Store x, rounded to the tensor's dtype; nothing for a tensor that is not there."""
    if pointer is not None:
        tl.store(pointer + offsets, narrow(x, pointer.dtype.element_ty), mask=inside)
