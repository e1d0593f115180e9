"""Bone's sums over blocks of channels in Triton: wide accesses, each activation touched once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv.ops.triton_chunks import narrow, widen

RANKS = (8, 16, 32, 64, 128, 256)
ROWS, COLUMNS = 8, 512  # of a tile; every rank divides COLUMNS


@triton.jit(do_not_specialize=["n"])
def _add_to_blocks_kernel(
    out, total, n, C, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A tile of out [n, C] += total [n, R], repeated along the channels."""
    tiles = tl.cdiv(C, COLUMNS)
    row = ((tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = ((tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (channel < C)
    at = out + row * C + channel
    before = widen(tl.load(at, mask=inside, other=0.0))
    added = widen(tl.load(total + row * R + channel % R, mask=inside, other=0.0))
    tl.store(at, narrow(before + added, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _sum_of_blocks_kernel(
    x, total, n, C, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """total [n, R] = sum of the blocks of R channels of x [n, C], for ROWS rows."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, COLUMNS)[None, :]
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, C, COLUMNS):
        inside = (row < n) & (first + channel < C)
        found += widen(tl.load(x + row * C + first + channel, mask=inside, other=0.0))
    found = tl.sum(tl.reshape(found, (ROWS, COLUMNS // R, R)), axis=1)
    at = total + row * R + tl.arange(0, R)[None, :]
    tl.store(at, narrow(found, total.dtype.element_ty), mask=row < n)


def add_to_blocks(out: Tensor, total: Tensor) -> None:
    """out [n, C] += total [n, R] in every block of R channels; both contiguous."""
    (n, C), R = out.shape, total.shape[1]
    grid = (triton.cdiv(n, ROWS) * triton.cdiv(C, COLUMNS),)
    with torch.cuda.device_of(out):
        _add_to_blocks_kernel[grid](out, total, n, C, R=R, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)


def sum_of_blocks(x: Tensor, R: int) -> Tensor:
    """The sum [n, R] of the blocks of R channels of x [n, C], contiguous, added in float32."""
    n, C = x.shape
    total = x.new_empty(n, R)
    with torch.cuda.device_of(x):
        _sum_of_blocks_kernel[(triton.cdiv(n, ROWS),)](
            x, total, n, C, R=R, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
        )
    return total
