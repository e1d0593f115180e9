"""Rounding rows to 8-bit floats and transposing codes, one Triton kernel each.

Both only move memory: a row of activations is read once and written in half its bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16384  # most values of a row that a program holds at once
TILE = 64  # side of a transposed tile, in bytes


@triton.jit
def _values(x, factor, at, K, SCALED: tl.constexpr):
    """Values of a row in float32, times their factors; 0 behind its end."""
    value = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(factor + at, mask=at < K, other=0.0)
    return value


@triton.jit
def _store_rounded(codes, value, inverse, at, K, LARGEST: tl.constexpr):
    inside = tl.minimum(tl.maximum(value * inverse, -LARGEST), LARGEST)
    tl.store(codes + at, inside.to(codes.dtype.element_ty), mask=at < K)


@triton.jit
def _round_rows(
    x,
    factor,
    codes,
    scale,
    K,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
):
    """One row of x [M, K], times factor [K] if SCALED, to its codes and its scale.

    WHOLE: the row fits into BLOCK and is read once; else it is read again to be rounded.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x += row * K
    codes += row * K
    value = _values(x, factor, at, K, SCALED)
    largest = tl.abs(value)
    if not WHOLE:
        for start in range(BLOCK, K, BLOCK):
            more = _values(x, factor, start + at, K, SCALED)
            largest = tl.maximum(largest, tl.abs(more))
    most = tl.maximum(tl.max(largest, 0), TINY)
    inverse = tl.div_rn(1.0, most) * LARGEST
    tl.store(scale + row, most * (1.0 / LARGEST))
    _store_rounded(codes, value, inverse, at, K, LARGEST)
    if not WHOLE:
        for start in range(BLOCK, K, BLOCK):
            more = _values(x, factor, start + at, K, SCALED)
            _store_rounded(codes, more, inverse, start + at, K, LARGEST)


@triton.jit
def _transpose(codes, out, M, N, TILE: tl.constexpr):
    """A tile of codes [M, N], bytes, to its place in out [N, M]."""
    m = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    n = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tile = tl.load(codes + m[:, None] * N + n[None, :], mask=inside, other=0)
    tl.store(out + n[:, None] * M + m[None, :], tl.trans(tile), mask=tl.trans(inside))


def round_rows(
    x: Tensor,
    factor: Tensor | None,
    *,
    largest: float,
    tiny: float,
    dtype: torch.dtype = torch.float8_e4m3fn,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Codes of the rows of x and the scale of each.

    Args:
        x: [M, K], of any float dtype.
        factor: of each column, float32, K values in a row of memory; None for ones.
        largest: value of the largest code.
        tiny: least largest value of a row.
        dtype: of the codes; float32 leaves the rounding out.
        block: most values of a row to hold at once, a power of two.

    Returns:
        codes [M, K], and scale [M, 1], float32.
    """
    x = x.contiguous()
    M, K = x.shape
    codes = torch.empty(M, K, dtype=dtype, device=x.device)
    scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    held = min(triton.next_power_of_2(K), block)
    with torch.cuda.device_of(x):
        _round_rows[(M,)](
            x, x if factor is None else factor, codes, scale, K,
            SCALED=factor is not None, WHOLE=held >= K, BLOCK=held, LARGEST=largest, TINY=tiny,
            num_warps=min(max(held // 1024, 1), 16),
        )  # fmt: skip
    return codes, scale


def transpose(codes: Tensor) -> Tensor:
    """Codes [M, N] of one byte each, by columns: [N, M], contiguous."""
    M, N = codes.shape
    out = torch.empty(N, M, dtype=codes.dtype, device=codes.device)
    grid = (triton.cdiv(M, TILE), triton.cdiv(N, TILE))
    with torch.cuda.device_of(codes):
        _transpose[grid](codes.view(torch.uint8), out.view(torch.uint8), M, N, TILE=TILE)
    return out
