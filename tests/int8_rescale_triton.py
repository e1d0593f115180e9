"""Sums of a product of whole numbers times their scales, a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft.int8_triton import scaled

CHUNK = 4096  # most columns that a program rescales


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
    value = scaled(value, tl.load(row_scale + row), column_scale, n, N, SCALED)
    if ADD:
        value += tl.load(out + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, value.to(out.dtype.element_ty), mask=n < N)


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
