"""Products of whole numbers: sums of int8 codes times their scales, a Triton kernel each way.

`rescale` follows a product that leaves its sums in memory, `product` rescales them where they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

CHUNK = 4096  # most columns that a program rescales
GROUP = 8  # tiles of rows that share their columns' codes while these are in the cache


@triton.jit
def _scaled(value, row_scale, column_scale, n, N, SCALED: tl.constexpr):
    value *= row_scale
    if SCALED:
        value *= tl.load(column_scale + n, mask=n < N, other=0.0)
    return value


@triton.jit
def _rescale(
    sums,
    row_scale,
    column_scale,
    out,
    N,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """CHUNK sums of a row of [M, N], times its scale and those of the columns if SCALED."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(sums + row * N + n, mask=n < N, other=0).to(tl.float32)
    value = _scaled(value, tl.load(row_scale + row), column_scale, n, N, SCALED)
    if ADD:
        value += tl.load(out + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, value.to(out.dtype.element_ty), mask=n < N)


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
    value = _scaled(sums.to(tl.float32), scale[:, None], column_scale, n[None, :], N, SCALED)
    if ADD:
        value += out.load([first, column]).to(tl.float32)
    out.store([first, column], value.to(out.dtype))


def rescale(
    sums: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    dtype: torch.dtype,
    into: Tensor | None = None,
) -> Tensor:
    """Sums [M, N], int32, times the scales of rows and columns.

    Args:
        sums: contiguous.
        row_scale: [M, 1], float32.
        column_scale: float32, N values in a row of memory; None for ones.
        dtype: of the result, if it is new.
        into: [M, N], contiguous, what they are added to in place.
    """
    M, N = sums.shape
    out = torch.empty(M, N, dtype=dtype, device=sums.device) if into is None else into
    chunk = min(triton.next_power_of_2(N), CHUNK)
    with torch.cuda.device_of(sums):
        _rescale[(M, triton.cdiv(N, chunk))](
            sums, row_scale, row_scale if column_scale is None else column_scale, out, N,
            SCALED=column_scale is not None, ADD=into is not None, CHUNK=chunk,
        )  # fmt: skip
    return out


def product(
    left: Tensor,
    row_scale: Tensor,
    right: Tensor,
    column_scale: Tensor | None,
    dtype: torch.dtype,
    into: Tensor | None = None,
    tile: tuple[int, int, int, int, int] = (128, 256, 128, 8, 3),
) -> Tensor:
    """Codes [M, K] times codes [N, K], rescaled as by `rescale`: [M, N].

    Args:
        left, right: int8, contiguous, K and N multiples of 16.
        others: those of `rescale`.
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
