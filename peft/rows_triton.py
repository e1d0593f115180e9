"""Rounding rows to 8-bit codes, transposing codes and unpacking them, one Triton kernel each.

All only move memory: a row of activations is read once and written in half its bytes, a weight is
read in half the bytes that are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16384  # most values of a row that a program holds at once
TILE = 64  # side of a transposed tile, in bytes
CHUNK = 4096  # most weights of a row that a program unpacks
# Added and taken away again, it leaves of a float32 below 2^22 the nearest whole number, of two
# equally near ones the even one: at 1.5 * 2^23 the last bit is a one.
WHOLE_NUMBER = tl.constexpr(12582912.0)


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
    if codes.dtype.element_ty == tl.int8:
        inside = (inside + WHOLE_NUMBER) - WHOLE_NUMBER
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


@triton.jit
def _unpack(codes, scale, out, K, FLOATS: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK weights of one row of codes [M, K], bytes: e4m3 if FLOATS, else whole numbers.

    An e4m3 code moved into a float16's place is its value over 2^(15 - 7). So it is read on GPUs
    that have no 8-bit floats.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    code = tl.load(codes + row * K + at, mask=at < K, other=0)
    if FLOATS:
        wide = code.to(tl.int16)
        half = ((wide >> 7) << 15) | ((wide & 127) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        value = code.to(tl.float32)
    value *= tl.load(scale + row)
    tl.store(out + row * K + at, value.to(out.dtype.element_ty), mask=at < K)


def round_rows(
    x: Tensor,
    factor: Tensor | None,
    *,
    largest: float,
    tiny: float,
    dtype: torch.dtype,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Codes of the rows of x and the scale of each.

    Args:
        x: [M, K], of any float dtype.
        factor: of each column, float32, K values in a row of memory; None for ones.
        largest: value of the largest code.
        tiny: least largest value of a row.
        dtype: of the codes, int8 or e4m3; float32 leaves the rounding out.
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


def unpack(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [M, K], int8 or e4m3, times each row's scale, [M, 1] float32: [M, K] in `dtype`."""
    M, K = codes.shape
    out = torch.empty(M, K, dtype=dtype, device=codes.device)
    chunk = min(triton.next_power_of_2(K), CHUNK)
    floats = codes.dtype == torch.float8_e4m3fn
    with torch.cuda.device_of(codes):
        _unpack[(M, triton.cdiv(K, chunk))](
            codes.view(torch.uint8) if floats else codes, scale, out, K, FLOATS=floats, CHUNK=chunk
        )
    return out
