"""Bone's block products in Triton: each activation is read once and written once.

In blocks of R channels, R the rank:

    mix      y_j = x_j + x_j G_j^T,  total = sum_j x_j G_j^T
    unmix    u_j = e_j + total,  dx_j = e_j + u_j G_j,  dG_j = u_j^T x_j
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv.ops import cuda_build
from rwkv.ops.triton_chunks import INTERPRETED, add_product, narrow, product, widen

# Rows of a tile, warps and stages by bytes of a number and rank: what leaves no register to memory.
LAUNCH = {
    (2, 16): {"ROWS": 128, "num_warps": 4, "num_stages": 3},
    (2, 32): {"ROWS": 64, "num_warps": 4, "num_stages": 3},
    (2, 64): {"ROWS": 64, "num_warps": 4, "num_stages": 3},
    (2, 128): {"ROWS": 64, "num_warps": 8, "num_stages": 2},
    (4, 16): {"ROWS": 64, "num_warps": 4, "num_stages": 2},
    (4, 32): {"ROWS": 32, "num_warps": 4, "num_stages": 2},
    (4, 64): {"ROWS": 32, "num_warps": 4, "num_stages": 2},
}
AMD_BYTES = {(2, 128): 80 << 10}  # of shared memory, where that is more than 64 KiB
PROGRAMS = 1024  # of `unmix`, about: several for each multiprocessor


def fits(G: Tensor) -> bool:
    """Whether the kernels handle blocks of this rank and dtype on the device of G."""
    size = G.dtype.itemsize, G.shape[-1]
    needed = 0 if torch.version.hip is None else AMD_BYTES.get(size, 0)
    return size in LAUNCH and cuda_build.too_small(G.device, needed) is None


def mix(x: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """y [n, C] and total [n, R] of x [n, C] and G [C / R, R, R], all of one dtype."""
    x, G = x.contiguous(), G.contiguous()
    n, C = x.shape
    R = G.shape[-1]
    launch = LAUNCH[G.dtype.itemsize, R]
    y, total = torch.empty_like(x), x.new_empty(n, R)
    with torch.cuda.device_of(x):
        _mix_kernel[(triton.cdiv(n, launch["ROWS"]),)](x, G, y, total, n, C, R=R, **launch)
    return y, total


def unmix(e: Tensor, total: Tensor, x: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """dx [n, C], and dG [C / R, R, R] in float32, of e and x [n, C] and total [n, R]."""
    e, total, x, G = (t.contiguous() for t in (e, total, x, G))
    n, C = x.shape
    R = G.shape[-1]
    launch = LAUNCH[G.dtype.itemsize, R]
    rows = launch["ROWS"] * triton.cdiv(n * (C // R), launch["ROWS"] * PROGRAMS)
    spans = triton.cdiv(n, rows)
    dx = torch.empty_like(x)
    dG = torch.empty(spans, C // R, R, R, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _unmix_kernel[(C // R, spans)](e, total, x, G, dx, dG, n, C, rows, R=R, **launch)
    return dx, dG.sum(dim=0)


@triton.jit
def _operand(tile):
    """A loaded tile as an operand; the interpreter multiplies bfloat16 as integers."""
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit(do_not_specialize=["n"])
def _mix_kernel(x, G, y, total, n, C, R: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, R)
    inside = (row < n)[:, None]
    at = row[:, None] * C + channel[None, :]
    transposed = channel[None, :] * R + channel[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    summed = tl.zeros((ROWS, R), tl.float32)
    for first in range(0, C, R):
        tile = tl.load(x + at + first, mask=inside, other=0.0)
        z = product(_operand(tile), _operand(tl.load(G + first * R + transposed)))
        tl.store(y + at + first, narrow(widen(tile) + z, dtype), mask=inside)
        summed += z
    at = row[:, None] * R + channel[None, :]
    tl.store(total + at, narrow(summed, dtype), mask=inside)


@triton.jit(do_not_specialize=["n", "rows"])
def _unmix_kernel(e, total, x, G, dx, dG, n, C, rows, R: tl.constexpr, ROWS: tl.constexpr):
    j = tl.program_id(0)
    span = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, R)
    dtype: tl.constexpr = x.dtype.element_ty
    square = channel[:, None] * R + channel[None, :]
    block = _operand(tl.load(G + j * R * R + square))
    found = tl.zeros((R, R), tl.float32)
    for first in range(0, rows, ROWS):
        row = span * rows + first + tl.arange(0, ROWS)
        inside = (row < n)[:, None]
        at = row[:, None] * C + j * R + channel[None, :]
        inner = widen(tl.load(e + at, mask=inside, other=0.0))
        shared = tl.load(total + row[:, None] * R + channel[None, :], mask=inside, other=0.0)
        u = narrow(inner + widen(shared), dtype)
        tile = _operand(tl.load(x + at, mask=inside, other=0.0))
        tl.store(dx + at, narrow(inner + product(u, block), dtype), mask=inside)
        found = add_product(found, tl.trans(u), tile)
    place = (span * tl.num_programs(0) + j) * R * R
    tl.store(dG + place + square, found)
