"""Products of int8 codes on Hopper's tensor cores, a Triton kernel that rescales its sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TILE = (256, 128, 128, 8, 3)  # of those that tests/bench_int8.py compares
GROUP = 8  # tiles of rows that share their columns' codes while these are in the cache


@triton.jit
def scaled(value, row_scale, column_scale, n, N, SCALED: tl.constexpr):
    """Sums times the scale of their rows and, if SCALED, of their columns n."""
    value *= row_scale
    if SCALED:
        value *= tl.load(column_scale + n, mask=n < N, other=0.0)
    return value


@triton.jit
def _product(
    left,
    right,
    row_scale,
    column_scale,
    out,
    M,
    N,
    K,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of left [M, K] times right [N, K] over K. All three matrices are described."""
    program = tl.program_id(0)
    down = tl.cdiv(M, ROWS)
    across = tl.cdiv(N, COLUMNS)
    band = program // (GROUP * across)
    high = tl.minimum(down - band * GROUP, GROUP)
    first = (band * GROUP + program % (GROUP * across) % high) * ROWS
    column = (program % (GROUP * across) // high) * COLUMNS
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for k in range(0, K, SUMMED):
        numbers = right.load([column, k])
        sums = tl.dot(left.load([first, k]), numbers.T, sums, out_dtype=tl.int32)
    m = first + tl.arange(0, ROWS)
    n = column + tl.arange(0, COLUMNS)
    scale = tl.load(row_scale + m, mask=m < M, other=0.0)
    value = scaled(sums.to(tl.float32), scale[:, None], column_scale, n[None, :], N, SCALED)
    if ADD:
        value += out.load([first, column]).to(tl.float32)
    out.store([first, column], value.to(out.dtype))


def product(
    left: Tensor,
    row_scale: Tensor,
    right: Tensor,
    column_scale: Tensor | None,
    dtype: torch.dtype,
    into: Tensor | None = None,
    tile: tuple[int, int, int, int, int] = TILE,
) -> Tensor:
    """Codes [M, K] times codes [N, K] and the scales of rows and columns: [M, N].

    Args:
        left, right: int8, contiguous, K and N multiples of 16.
        row_scale: [M, 1], float32.
        column_scale: float32, N values in a row of memory; None for ones.
        dtype: of the result, if it is new.
        into: [M, N], contiguous, what the product is added to in place.
        tile: rows and columns of the result that a program sums, numbers that it sums at once, its
            warps, and how many of its steps are loaded ahead.
    """
    (M, K), N = left.shape, right.shape[0]
    out = torch.empty(M, N, dtype=dtype, device=left.device) if into is None else into
    rows, columns, summed, warps, stages = tile
    grid = (triton.cdiv(M, rows) * triton.cdiv(N, columns),)
    with torch.cuda.device_of(left):
        _product[grid](
            TensorDescriptor.from_tensor(left, [rows, summed]),
            TensorDescriptor.from_tensor(right, [columns, summed]),
            row_scale, row_scale if column_scale is None else column_scale,
            TensorDescriptor.from_tensor(out, [rows, columns]), M, N, K,
            SCALED=column_scale is not None, ADD=into is not None,
            ROWS=rows, COLUMNS=columns, SUMMED=summed, GROUP=GROUP,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
