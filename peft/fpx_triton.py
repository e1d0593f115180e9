"""The packed floats of peft/store_fpx.py to a dense weight, in one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # weights a program


@triton.jit
def _unpack(
    low,
    high,
    scale,
    out,
    total,
    one,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """CHUNK weights from their two planes and block scales.

    A code moved into a float16's place is its value over `one`; see PackedFloatStore.
    """
    i = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = i < total
    width: tl.constexpr = E + M - 3
    per: tl.constexpr = 8 // width
    below = (tl.load(low + i // 2, mask=inside, other=0) >> ((i % 2) * 4).to(tl.uint8)) & 15
    above = tl.load(high + i // per, mask=inside, other=0) >> ((i % per) * width).to(tl.uint8)
    code = (below | ((above & ((1 << width) - 1)) << 4)).to(tl.int16)
    sign = (code >> (E + M)) << 15
    magnitude = (code & ((1 << (E + M)) - 1)) << (10 - M)
    value = (sign | magnitude).to(tl.float16, bitcast=True).to(tl.float32)
    factor = tl.load(scale + i // BLOCK, mask=inside, other=0.0).to(tl.float32) * one
    tl.store(out + i, (value * factor).to(out.dtype.element_ty), mask=inside)


def unpack(
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    *,
    total: int,
    one: float,
    bits: tuple[int, int],
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """The first `total` weights, [total], in `dtype`.

    Args:
        low, high, scale: as PackedFloatStore keeps them.
        total: weights, without the padding of the last block.
        one: the power of two between a shifted code and its value.
        bits: of exponent and mantissa.
        block: weights a scale.
        dtype: of the result.
    """
    out = torch.empty(total, dtype=dtype, device=low.device)
    grid = (triton.cdiv(total, CHUNK),)
    with torch.cuda.device_of(low):
        _unpack[grid](
            low, high, scale, out, total, one, E=bits[0], M=bits[1], BLOCK=block, CHUNK=CHUNK
        )
    return out
