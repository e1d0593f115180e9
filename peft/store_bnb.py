"""4-bit storage through bitsandbytes: nf4 and fp4, in blocks of 64 weights.

The codes are ours, for a block whose scale is a little larger or smaller than its largest weight
has less error; they mean what bitsandbytes' mean, whose kernels unpack them. All that it knows
stays in this file: codes are kept as plain buffers, and its QuantState is put together at each use.
Source: QLoRA, arXiv:2305.14314 (nf4, double quantization).
"""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peft.store import Store, best_scale, fill
from rwkv.errors import RunError
from rwkv.linear import SLICE

BLOCK = 64  # weights a scale, as in QLoRA
BLOCK_OF_SCALES = 256  # scales a second-level scale, fixed by bitsandbytes
# Tried for each block, times its largest weight: on Gaussian weights the error of nf4 is 5% less
# than with 1 alone, of fp4 6%; ten of them would make it another 1.5%.
SCALES = (1.03, 0.95, 0.87)
DOUBLE = "_double"


class FourBitStore(Store):
    """A weight as 4-bit codes with one scale a block of 64, row after row.

    codes: [out * in / 2, 1], uint8, two weights each, the first in the upper half.
    scale: of each block, [out * in / 64]: float32, or uint8 codes if doubly quantized, with
        `second` (a float32 scale for each 256 of them), `table` (what each 8-bit code means, [256])
        and `offset` (their mean, [1]).
    """

    GROUP = BLOCK

    codes: Tensor
    scale: Tensor

    @staticmethod
    def size(kind: str, out_features: int, in_features: int) -> int:
        weights = out_features * in_features
        scales = -(-weights // BLOCK)
        if not _is_double(kind):
            return -(-weights // 2) + 4 * scales
        seconds = -(-scales // BLOCK_OF_SCALES)
        return -(-weights // 2) + scales + 4 * (seconds + 256 + 1)

    @staticmethod
    def check_package() -> None:
        if find_spec("bitsandbytes") is None:
            raise _missing("it is not installed")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        functional = _functional()
        table = _table(_table_name(self.kind), weight.device)
        flat = weight.flatten()
        codes = flat.new_empty(-(-len(flat) // 2), dtype=torch.uint8)
        scale = flat.new_empty(-(-len(flat) // BLOCK), dtype=torch.float32)
        fill((codes, scale), (_quantized(some, table) for some in flat.split(SLICE)))
        buffers = {"codes": codes.view(-1, 1), "scale": scale}
        if _is_double(self.kind):
            offset = scale.mean(dtype=torch.float64).float()  # on a GPU as on a CPU
            buffers["scale"], state = functional.quantize_blockwise(
                scale - offset, blocksize=BLOCK_OF_SCALES
            )
            buffers |= {"second": state.absmax, "table": state.code, "offset": offset.view(1)}
        return buffers

    def dense(self, dtype: torch.dtype) -> Tensor:
        out: Tensor = _functional().dequantize_4bit(self.codes, self._state(dtype))
        return out.view(self.shape)

    def some_rows(self, index: Tensor) -> Store:
        """Of scales that are codes themselves, 256 share a scale, which are those of some rows."""
        if not _is_double(self.kind):
            return super().some_rows(index)
        parts = self.tensors()
        of_row = torch.arange(self.shape[1] // BLOCK, device=index.device)
        at = (index[:, None] * len(of_row) + of_row).flatten()
        scale = parts["table"][parts["scale"][at].int()]
        scale = scale * parts["second"][at // BLOCK_OF_SCALES] + parts["offset"]
        codes = parts["codes"].view(self.shape[0], -1)[index].view(-1, 1)
        plain = self.kind.removesuffix(DOUBLE)
        return self.restored(
            plain,
            {"codes": codes, "scale": scale},
            shape=(len(index), self.shape[1]),
            dtype=self.dtype,
        )

    def _state(self, dtype: torch.dtype) -> Any:
        functional = _functional()
        buffers = self.tensors()
        # bitsandbytes' CPU kernel (0.50) starts a block at each row: here a row is a block
        total = self.shape[0] * self.shape[1]
        rows = (1, total) if total % BLOCK else (total // BLOCK, BLOCK)
        first = functional.QuantState(
            absmax=buffers["scale"],
            shape=torch.Size(rows),
            code=_table(_table_name(self.kind), self.codes.device),
            blocksize=BLOCK,
            quant_type=_table_name(self.kind),
            dtype=dtype,
        )
        if "second" in buffers:
            first.offset = buffers["offset"].view(())
            first.state2 = functional.QuantState(
                absmax=buffers["second"],
                code=buffers["table"],
                blocksize=BLOCK_OF_SCALES,
                dtype=torch.float32,
            )
            first.nested = True
        return first


def _quantized(weights: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of weights [n], uint8 [n / 2], and the scale of each block of them, float32.

    table: what each code means, in any order, [16].
    """
    blocks = F.pad(weights.float(), (0, -len(weights) % BLOCK)).view(-1, BLOCK)
    values, code_of = table.sort()
    borders = (values[1:] + values[:-1]) / 2
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    tried = largest * largest.new_tensor(SCALES)  # [blocks, scales]

    def nearest(scale: Tensor) -> Tensor:
        return torch.bucketize(blocks / scale, borders)

    scale = best_scale(
        tried, lambda one: torch.addcmul(blocks, values[nearest(one)], one, value=-1)
    )
    codes = code_of[nearest(scale)].to(torch.uint8).flatten()
    codes = F.pad(codes[: len(weights)], (0, len(weights) % 2))
    return codes[::2] << 4 | codes[1::2], scale.flatten()


def _is_double(kind: str) -> bool:
    return kind.endswith(DOUBLE)


def _table_name(kind: str) -> str:
    """bitsandbytes' word for the codes: nf4 or fp4."""
    return kind.removesuffix("_double")


@cache
def _table(kind: str, device: torch.device) -> Tensor:
    """What each of the 16 codes means, [16]; one copy a device."""
    table: Tensor = _functional().get_4bit_type(kind, device=device)
    return table


def _functional() -> Any:
    # up to 0.50 it asks for kernels that nothing here calls, on processors that might run them
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise _missing(error) from None
    return functional


def _missing(why: object) -> RunError:
    return RunError(
        f"nf4 and fp4: need bitsandbytes ({why}); pip install bitsandbytes, or choose "
        "int8, fp8, fp6 or fp5"
    )
