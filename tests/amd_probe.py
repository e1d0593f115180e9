"""Compile every tile operation that the Triton operators share for an AMD GPU, without one.

Run as a script, in a process of its own: Triton remembers the globals that a function was compiled
with, and refuses to launch it with others.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rwkv.ops import triton_chunks
from rwkv.ops.triton_chunks import add_product, narrow, narrow_where, product, widen

TYPES = {"x": "*bf16", "y": "*fp32", "mask": "*i16", "out": "*fp32"}


@triton.jit
def tiles_kernel(x, y, mask, out):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    wide = widen(tl.load(x + at))
    masked = narrow_where(tl.load(mask + at), wide, tl.bfloat16)
    fine, exact = narrow(wide, tl.float16), tl.load(y + at)
    total = product(narrow(wide, tl.bfloat16), masked)
    total = add_product(total, fine, narrow_where(tl.load(mask + at), wide, tl.float16))
    tl.store(out + at, add_product(total, exact, narrow(exact, tl.float32)))


if __name__ == "__main__":
    triton_chunks.NVIDIA = tl.constexpr(False)
    triton_chunks.PRECISION = tl.constexpr("ieee")
    source = ASTSource(tiles_kernel, TYPES, {})
    assert triton.compile(source, target=GPUTarget("hip", "gfx942", 64)).asm["hsaco"]
