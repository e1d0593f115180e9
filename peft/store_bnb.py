"""4-bit storage through bitsandbytes: nf4 and fp4, in blocks of 64 weights.

Source: QLoRA, arXiv:2305.14314 (nf4, double quantization). All that bitsandbytes knows stays in
this file: the codes are kept as plain buffers, and its QuantState is put together at each use.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from peft.store import Store
from rwkv.errors import RunError

BLOCK = 64  # weights a scale, as in QLoRA
BLOCK_OF_SCALES = 256  # scales a second-level scale, fixed by bitsandbytes


class FourBitStore(Store):
    """A weight as 4-bit codes with one scale a block of 64, row after row.

    codes: [out * in / 2, 1], uint8, two weights each.
    scale: largest absolute value of each block, [out * in / 64]: float32, or uint8 codes if
        doubly quantized, with `second` (a float32 scale for each 256 of them), `table` (what each
        8-bit code means, [256]) and `offset` (their mean, [1]).
    """

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

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        codes, state = _functional().quantize_4bit(
            weight.contiguous(),
            blocksize=BLOCK,
            compress_statistics=_is_double(self.kind),
            quant_type=_table_name(self.kind),
        )
        buffers = {"codes": codes, "scale": state.absmax}
        if _is_double(self.kind):
            second = {"second": state.state2.absmax, "table": state.state2.code}
            buffers |= second | {"offset": state.offset.view(1)}
        return buffers

    def dense(self, dtype: torch.dtype) -> Tensor:
        out: Tensor = _functional().dequantize_4bit(self.codes, self._state(dtype))
        return out.view(self.shape)

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


def _is_double(kind: str) -> bool:
    return kind.endswith("_double")


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
        raise RunError(
            f"nf4 and fp4: need bitsandbytes ({error}); pip install bitsandbytes, or choose "
            "int8, fp8, fp6 or fp5"
        ) from None
    return functional
