"""6-bit (e3m2, e2m3) and 5-bit (e2m2) floats, packed, with a bfloat16 scale for each 64 weights.

A format has 1 sign, E exponent and M mantissa bits, no infinities, the exponent bias 2^(E-1) - 1
and subnormals. With the scales a weight costs 6.25 and 5.25 bits.
Source: OCP Microscaling Formats v1.0 for e3m2 and e2m3; FP6-LLM, arXiv:2401.14112, for 5 and 6
bits and for splitting the codes into a 4-bit and a narrow plane.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from peft.store import Store, best_scale, fill, triton_kernels
from rwkv.linear import SLICE

FORMATS = {"fp6": (3, 2), "fp6_e2m3": (2, 3), "fp5": (2, 2)}  # exponent and mantissa bits
BLOCK = 64  # weights a scale
SCALES = {  # tried for each block, over the least that clips nothing; found on Gaussian weights
    "fp6": (1.0, 1.15, 1.35, 1.4, 1.75, 1.8),
    "fp6_e2m3": (1.0, 1.05, 1.15, 1.25, 1.35, 1.5),
    "fp5": (1.0, 0.95, 1.05, 1.15, 1.2, 1.35),
}
HALF_MANTISSA, HALF_BIAS = 10, 15  # of float16, which every code is a shifted prefix of


class PackedFloatStore(Store):
    """A weight as codes of 6 or 5 bits.

    Weights are taken row after row, padded with zeros to a whole number of blocks. A block's scale
    is the one of SCALES with the least squared error: the largest weight lies at the format's top
    or below it, where most of the block may meet narrower steps.

    low: [weights / 2], uint8, the lower 4 bits of two weights, the first in the lower half.
    high: the other 2 bits of four weights or 1 bit of eight, uint8, in the same order.
    scale: [weights / 64], bfloat16.
    """

    GROUP = BLOCK

    low: Tensor
    high: Tensor
    scale: Tensor

    @staticmethod
    def size(kind: str, out_features: int, in_features: int) -> int:
        bits = 1 + sum(FORMATS[kind])
        blocks = -(-out_features * in_features // BLOCK)
        return blocks * (BLOCK * bits // 8 + 2)

    @property
    def magnitude_bits(self) -> int:
        """Of a code without its sign."""
        return sum(FORMATS[self.kind])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        flat = weight.flatten()
        count = -(-len(flat) // BLOCK)
        low = flat.new_empty(count * BLOCK // 2, dtype=torch.uint8)
        high = flat.new_empty(count * BLOCK * self._high_bits // 8, dtype=torch.uint8)
        scale = flat.new_empty(count, dtype=torch.bfloat16)
        fill((low, high, scale), map(self._quantized, flat.split(SLICE)))
        return {"low": low, "high": high, "scale": scale}

    @property
    def _high_bits(self) -> int:
        """Of a code, above the lower 4."""
        return self.magnitude_bits - 3

    def _quantized(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both planes and the scales of weights [n], the last block padded with zeros."""
        blocks = F.pad(weights.float(), (0, -len(weights) % BLOCK)).view(-1, BLOCK)
        grid = self._grid().to(blocks.device)
        sizes = blocks.abs()
        least = (sizes.amax(dim=1, keepdim=True) / grid[-1]).clamp_min(1e-30)
        tried = (least * least.new_tensor(SCALES[self.kind])).to(torch.bfloat16)  # [blocks, scales]
        scale = best_scale(tried, lambda one: self._wrong(sizes, one.float()))
        borders = (grid[1:] + grid[:-1]) / 2
        codes = torch.bucketize(sizes / scale.float(), borders, out_int32=True).to(torch.uint8)
        codes |= (blocks < 0).to(torch.uint8) << self.magnitude_bits
        return *_pack(codes.flatten(), 1 + self.magnitude_bits), scale.flatten()

    def _wrong(self, sizes: Tensor, scale: Tensor) -> Tensor:
        """What each size is off under its block's scale, [blocks, weights].

        Sizes are rounded to float16 first, which may take one from just below the middle of two
        values to the upper one.
        """
        cut = HALF_MANTISSA - FORMATS[self.kind][1]
        bits = (sizes / (scale * self._one())).to(torch.float16).view(torch.int16)
        top = ((1 << self.magnitude_bits) - 1) << cut
        bits.add_(1 << (cut - 1)).bitwise_and_(-1 << cut).clamp_(max=top)
        values = bits.view(torch.float16).float()
        return torch.addcmul(sizes, values, scale * self._one(), value=-1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        total = self.shape[0] * self.shape[1]
        kernels = triton_kernels("peft.fpx_triton", self.kind, self.low)
        if kernels is not None:
            return kernels.unpack(
                self.low,
                self.high,
                self.scale,
                total=total,
                one=self._one(),
                bits=FORMATS[self.kind],
                block=BLOCK,
                dtype=dtype,
            ).view(self.shape)
        out = torch.empty(len(self.scale) * BLOCK, dtype=dtype, device=self.low.device)
        # exact: at most 3 + 8 bits of mantissa before one rounding
        work = dtype if dtype == torch.bfloat16 else torch.float32

        def unpacked(low: Tensor, high: Tensor, scale: Tensor) -> tuple[Tensor]:
            values = self._values(_unpack(low, high, 1 + self.magnitude_bits)).view(-1, BLOCK)
            weights = values.to(work).mul_(scale.to(work).unsqueeze(1)).mul_(self._one())
            return (weights.flatten(),)

        slices = (
            self.low.split(SLICE // 2),
            self.high.split(SLICE * self._high_bits // 8),
            self.scale.split(SLICE // BLOCK),
        )
        fill((out,), map(unpacked, *slices))
        return out[:total].view(self.shape)

    def _values(self, codes: Tensor) -> Tensor:
        """What codes (uint8) mean, over `_one`, float16.

        A code is a float16 without its last bits and with fewer exponent bits, so moving it into
        place gives its value over 2^(15 - bias), subnormals included.
        """
        mantissa_bits = FORMATS[self.kind][1]
        wide = codes.to(torch.int16)
        sign = (wide >> self.magnitude_bits) << 15
        magnitude = (wide & ((1 << self.magnitude_bits) - 1)) << (HALF_MANTISSA - mantissa_bits)
        return (sign | magnitude).view(torch.float16)

    def _one(self) -> float:
        """The power of two between a shifted code and its value."""
        exponent_bits = FORMATS[self.kind][0]
        return 2.0 ** (HALF_BIAS - (2 ** (exponent_bits - 1) - 1))

    def _grid(self) -> Tensor:
        """The values of the codes without sign, rising, float32."""
        codes = torch.arange(2**self.magnitude_bits, dtype=torch.uint8)
        return self._values(codes).float() * self._one()


def _pack(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Split codes into their 4-bit plane and the plane of what lies above."""
    low = codes & 15
    above, width = codes >> 4, bits - 4
    return _join(low, 4), _join(above, width)


def _join(parts: Tensor, width: int) -> Tensor:
    """Pack parts of `width` bits into bytes, the first in the lowest bits."""
    lanes = parts.view(-1, 8 // width)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=parts.device)
    return (lanes << shifts).sum(dim=1, dtype=torch.uint8)


def _split(packed: Tensor, width: int) -> Tensor:
    """The parts of `width` bits that `_join` packed."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & ((1 << width) - 1)).flatten()


def _unpack(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The codes, uint8, in order."""
    return _split(low, 4) | (_split(high, bits - 4) << 4)
