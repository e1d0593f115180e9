"""What the Triton operators share: which tokens a chunk holds, and matrix products of its tiles.

A sequence is cut into chunks of C tokens; every chunk of every sequence has a slot, a number by
which its state and its other intermediates are stored. Unpacked, sequence q has the slots
q * ceil(T / C) and following. Packed, text q starts at slot cu_seqlens[q] // C + q: floor(x / C) of
two neighbours differ by at least ceil(length / C) - 1, so the ranges never overlap, and
T // C + Q slots suffice for any lengths, known to the host without reading cu_seqlens. The few
slots this leaves empty have a length of zero or less.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv.ops import cuda_build
from rwkv.ops.packing import known

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# What only NVIDIA's compiler takes: instructions written out, and tf32.
NVIDIA = tl.constexpr(torch.version.hip is None)
PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")


def why_not(sample: Tensor, shared: int = 0) -> str | None:
    """Why kernels cannot run on tensors like this one, or None.

    shared: bytes of shared memory of their largest block, if they are more than 99 KiB.
    """
    N = sample.shape[-1]
    if sample.dtype not in (torch.bfloat16, torch.float32):
        return f"computes in bfloat16 or float32, the tensors are {sample.dtype}"
    if INTERPRETED.value:
        return None
    if sample.device.type != "cuda":
        return f"needs a GPU, the tensors are on {sample.device}"
    if torch.cuda.get_device_capability(sample.device) < (8, 0):
        return "needs compute capability 8.0 or more"
    if N not in (64, 128):
        return f"handles heads of 64 or 128 channels, not {N}"
    return cuda_build.too_small(sample.device, shared) if shared else None


def slot_owners(cu_seqlens: Tensor | None, slots: int, C: int) -> Tensor | None:
    """The text of every slot, [slots], int32, made on the device; None unless packed."""
    if cu_seqlens is None:
        return None

    def make() -> Tensor:
        owners = torch.empty(slots, dtype=torch.int32, device=cu_seqlens.device)
        _slot_owners_kernel[(cu_seqlens.shape[0] - 1,)](cu_seqlens, owners, C=C, BLOCK=128)
        return owners

    return known(cu_seqlens, ("owners", slots, C), make)


@triton.jit
def _slot_owners_kernel(cu_seqlens, owners, C: tl.constexpr, BLOCK: tl.constexpr):
    q = tl.program_id(0)
    first = tl.load(cu_seqlens + q).to(tl.int64) // C + q
    after = tl.load(cu_seqlens + q + 1).to(tl.int64) // C + q + 1
    for start in range(0, after - first, BLOCK):
        slot = first + start + tl.arange(0, BLOCK)
        tl.store(owners + slot, q, mask=slot < after)


@triton.jit
def slot_tokens(slot, owners, cu_seqlens, T, C: tl.constexpr):
    """The first token of a slot, counted over all rows, and how many follow in its sequence."""
    if cu_seqlens is None:
        chunks = tl.cdiv(T, C)
        row = slot // chunks
        chunk = slot % chunks
        start = row.to(tl.int64) * T + chunk * C
        left = T - chunk * C
    else:
        q = tl.load(owners + slot)
        begin = tl.load(cu_seqlens + q).to(tl.int64)
        chunk = slot - (begin // C + q)
        start = begin + chunk * C
        left = (tl.load(cu_seqlens + q + 1) - start).to(tl.int32)
    return start, left


@triton.jit
def sequence_slots(q, cu_seqlens, T, C: tl.constexpr):
    """The first token, the number of tokens and the first slot of sequence q."""
    if cu_seqlens is None:
        begin = q.to(tl.int64) * T
        length = T
        slot = q.to(tl.int64) * tl.cdiv(T, C)
    else:
        begin = tl.load(cu_seqlens + q).to(tl.int64)
        length = (tl.load(cu_seqlens + q + 1) - begin).to(tl.int32)
        slot = begin // C + q
    return begin, length, slot


@triton.jit
def widen(x):
    """x in float32; two bfloat16 values by two instructions, the compiler (3.6) takes three."""
    if INTERPRETED or not NVIDIA or x.dtype != tl.bfloat16:
        y = x.to(tl.float32)
    else:
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return y


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to `dtype`, as an operand of `product` or for a store.

    On NVIDIA's GPUs one instruction rounds two values; left alone, the compiler (3.6) moves a mask
    behind the rounding and then rounds one by one. Triton's interpreter (3.7) truncates where it
    should round to bfloat16 and multiplies bfloat16 as integers; there the value is rounded by hand
    and stays float32.
    """
    if dtype == tl.float32:
        y = x
    elif INTERPRETED and dtype == tl.float16:
        y = x.to(tl.float16)
    elif INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = bits.to(tl.float32, bitcast=True)
    elif not NVIDIA:
        y = x.to(dtype)
    elif dtype == tl.float16:
        y = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return y


@triton.jit
def narrow_where(mask, x, dtype: tl.constexpr):
    """narrow(x) where the int16 mask is -1, 0 where it is 0, also for x that is infinite."""
    if INTERPRETED or not NVIDIA or dtype == tl.float32:
        y = narrow(tl.where(mask != 0, x, 0.0), dtype)
    elif dtype == tl.float16:
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 y; cvt.rn.f16x2.f32 y, $2, $1; and.b32 $0, y, $3; }",
            "=r,r,r,r",
            [x, mask],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 y; cvt.rn.bf16x2.f32 y, $2, $1; and.b32 $0, y, $3; }",
            "=r,r,r,r",
            [x, mask],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return y


@triton.jit
def power_below(x):
    """The power of two at or below the largest |x| of a tile, float32, from 2^-60 to 2^100.

    At 2^-60 a tile of zeros still has room: a product of two powers is no subnormal number, and an
    inverse times the 2^28 of half a chunk's decays is finite.
    """
    largest = tl.max(tl.max(tl.abs(x.to(tl.float32)), axis=1), axis=0)
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 67 << 23), 227 << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(power):
    """log2 of a power of two, float32."""
    return ((power.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)


@triton.jit
def power_of(exponent):
    """2 to a whole number, float32, exact."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def product(x, y):
    """x @ y, float32. Float32 operands are multiplied in three tf32 products, nearly exactly."""
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def add_product(total, x, y):
    """total + x @ y, as `product`."""
    return tl.dot(x, y, total, input_precision=PRECISION)
