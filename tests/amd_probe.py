"""A kernel of every tile operation that the Triton operators share."""

import triton
import triton.language as tl

from rwkv.ops.triton_chunks import add_product, narrow, narrow_where, product, widen


@triton.jit
def tiles_kernel(x, y, mask, out):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    wide = widen(tl.load(x + at))
    masked = narrow_where(tl.load(mask + at), wide, tl.bfloat16)
    fine, exact = narrow(wide, tl.float16), tl.load(y + at)
    total = product(narrow(wide, tl.bfloat16), masked)
    total = add_product(total, fine, narrow_where(tl.load(mask + at), wide, tl.float16))
    tl.store(out + at, add_product(total, exact, narrow(exact, tl.float32)))
