"""Adding a product of low rank to a large matrix in one pass over it, a Triton kernel.

cuBLAS takes 2.6 times as long as the bytes do where the summed side has 64 numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = COLUMNS = 128  # of a tile
RANKS = (16, 32, 64, 128, 256)


@triton.jit(do_not_specialize=["T"])
def _add_product_kernel(
    out,
    low,
    factor,
    T,
    N,
    along_rank,
    along_columns,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of out [T, N] += low [T, R] factor [R, N]."""
    tiles = tl.cdiv(N, COLUMNS)
    t = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, R)
    rows, columns = (t < T)[:, None], (n < N)[None, :]
    left = tl.load(low + t[:, None] * R + r[None, :], mask=rows, other=0.0)
    right = tl.load(
        factor + r[:, None] * along_rank + n[None, :] * along_columns, mask=columns, other=0.0
    )
    at = out + t[:, None] * N + n[None, :]
    before = tl.load(at, mask=rows & columns, other=0.0)
    total = before.to(tl.float32) + tl.dot(left, right, input_precision="tf32x3")
    tl.store(at, total.to(out.dtype.element_ty), mask=rows & columns)


def add_product(out: Tensor, low: Tensor, factor: Tensor) -> None:
    """out [T, N] += low [T, R] factor [R, N], all of one dtype; out and low contiguous."""
    (T, N), R = out.shape, low.shape[1]
    grid = (triton.cdiv(T, ROWS) * triton.cdiv(N, COLUMNS),)
    with torch.cuda.device_of(out):
        _add_product_kernel[grid](
            *(out, low, factor, T, N, *factor.stride()),
            R=R,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=8,
        )
