"""Work on many tensors in one launch, in Triton: the norm of all together, and a step of AdamW.

A model has hundreds of small tensors beside its large ones, and to launch kernels for each, or for
some dozens at once, takes the host longer than the GPU works. So a launch gets the addresses of all
tensors in a table. Each program has one piece of one tensor.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv.ops.triton_chunks import narrow, widen

PIECE = 4096  # elements of a program
WARPS = 8
ALIGNED = 16  # bytes, and elements: where all tensors have it, a thread reads so many at once


class Moments(NamedTuple):
    """What a step of AdamW does to one tensor, and by how much.

    parameter: bfloat16 or float32; it gets the result.
    gradient: of its shape and dtype.
    master: float32; the parameter itself where that has this dtype.
    exp_avg, exp_avg_sq: float32, Adam's means.
    rate: of learning, divided by the correction of the first mean.
    root: one over the root of the correction of the second.
    decay: what the weight is multiplied by.
    """

    parameter: Tensor
    gradient: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    rate: float
    root: float
    decay: float


class Pieces(NamedTuple):
    """What each program works on: a tensor's number and the piece's in it, [pieces], int32; and the
    elements of each tensor, [tensors], int64."""

    owners: Tensor
    places: Tensor
    sizes: Tensor


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of each piece of contiguous tensors of one dtype, float32."""
    addresses = [x.data_ptr() for x in tensors]
    sizes = tuple(x.numel() for x in tensors)
    device = tensors[0].device
    with torch.cuda.device_of(tensors[0]):
        pieces = _pieces(sizes, device)
        sums = torch.empty(len(pieces.owners), dtype=torch.float32, device=device)
        _squares_kernel[(len(sums),)](
            _table(addresses, torch.int64, device),
            *pieces,
            sums,
            DTYPE=TYPES[tensors[0].dtype],
            ALIGN=_alignment(addresses, sizes),
            PIECE=PIECE,
            num_warps=WARPS,
        )
    return sums


def adamw(
    work: Sequence[Moments], factor: Tensor | None, *, betas: tuple[float, float], eps: float
) -> None:
    """A step of AdamW for contiguous tensors, those of a kind (see Moments) of one dtype.

    Args:
        work: on one device.
        factor: float32 scalar that gradients are multiplied by; None for 1.
        betas, eps: AdamW's.
    """
    columns = list(zip(*work, strict=True))
    addresses = [x.data_ptr() for column in columns[:5] for x in column]
    sizes = tuple(x.numel() for x in columns[0])
    parameter = work[0].parameter
    device = parameter.device
    numbers = [number for column in columns[5:] for number in column]
    with torch.cuda.device_of(parameter):
        pieces = _pieces(sizes, device)
        _adamw_kernel[(len(pieces.owners),)](
            _table(addresses, torch.int64, device),
            _table(numbers, torch.float32, device),
            *pieces,
            factor if factor is not None else torch.ones((), device=device),
            len(work),
            1.0 - betas[0],  # here, for in float32 it would lose digits
            betas[1],
            1.0 - betas[1],
            eps,
            DTYPE=TYPES[parameter.dtype],
            ALIGN=_alignment(addresses, sizes),
            PIECE=PIECE,
            num_warps=WARPS,
        )


TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _alignment(addresses: Sequence[int], sizes: Sequence[int]) -> int:
    return 1 if any(x % ALIGNED for x in (*addresses, *sizes)) else ALIGNED


def _table(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host, on the device; nothing waits for them."""
    on_gpu = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=on_gpu).to(device, non_blocking=True)


@lru_cache(maxsize=8)
def _pieces(sizes: tuple[int, ...], device: torch.device) -> Pieces:
    counts = torch.tensor([-(-size // PIECE) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    places = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    return Pieces(
        owners.to(device, torch.int32),
        places.to(device, torch.int32),
        torch.tensor(sizes).to(device),
    )


@triton.jit
def _span(owners, places, sizes, ALIGN: tl.constexpr, PIECE: tl.constexpr):
    """The tensor of this program, its elements, and which of them there are."""
    piece = tl.program_id(0)
    number = tl.load(owners + piece)
    at = tl.load(places + piece).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    return number, at, at < tl.multiple_of(tl.load(sizes + number), ALIGN)


@triton.jit
def _begin(addresses, number, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Where a tensor begins."""
    return tl.multiple_of(tl.load(addresses + number).to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def _squares_kernel(
    addresses,
    owners,
    places,
    sizes,
    sums,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    PIECE: tl.constexpr,
):
    number, at, inside = _span(owners, places, sizes, ALIGN, PIECE)
    x = widen(tl.load(_begin(addresses, number, DTYPE, ALIGN) + at, mask=inside, other=0.0))
    tl.store(sums + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit
def _adamw_kernel(
    addresses,
    numbers,
    owners,
    places,
    sizes,
    factor,
    count,
    new1,
    beta2,
    new2,
    eps,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    PIECE: tl.constexpr,
):
    number, at, inside = _span(owners, places, sizes, ALIGN, PIECE)
    gradient = _begin(addresses, count + number, DTYPE, ALIGN) + at
    master = _begin(addresses, 2 * count + number, tl.float32, ALIGN) + at
    mean = _begin(addresses, 3 * count + number, tl.float32, ALIGN) + at
    square = _begin(addresses, 4 * count + number, tl.float32, ALIGN) + at
    g = widen(tl.load(gradient, mask=inside, other=0.0)) * tl.load(factor)
    m = tl.load(mean, mask=inside, other=0.0)
    v = tl.load(square, mask=inside, other=0.0)
    w = tl.load(master, mask=inside, other=0.0)
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    tl.store(mean, m, mask=inside)
    tl.store(square, v, mask=inside)
    rate = tl.load(numbers + number)
    root = tl.load(numbers + count + number)
    w *= tl.load(numbers + 2 * count + number)
    w -= rate * m / (tl.sqrt(v) * root + eps)
    tl.store(master, w, mask=inside)
    parameter = _begin(addresses, number, DTYPE, ALIGN) + at
    if parameter.dtype.element_ty != tl.float32:
        tl.store(parameter, narrow(w, DTYPE), mask=inside)
