"""Ways to multiply by an int8 weight beside each other: times, errors, gradients of whole models.

    python -m tests.bench_int8                                     on a GPU, about a minute
    python -m tests.bench_int8 --model FILE [--text FILE]          and of a real model
    python -m tests.bench_int8 --sides 64 32 --tokens 32 --layers 2 --channels 64    on a CPU

`dense` candidates unpack the weight and multiply in the activations' dtype. `whole` ones round the
activations of each token (going back, the gradients times the scales of W's rows) to int8 too and
multiply whole numbers. `blocks` are bitsandbytes' block-wise codes, a float32 scale for each 64 or
256 weights; its own table of 256 values is dense about 0, the linear one has even steps. On a CPU
all with Triton are their formulas in plain torch.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import peft.apply
from peft.apply import load_with_profile, random_with_profile
from peft.store import Store, triton_kernels
from peft.store_int8 import LEAST_ROWS, SIDE, whole_product
from peft.store_rows import RowStore, rounded_rows, transposed
from rwkv.checkpoint import config_of, read_tensors
from rwkv.config import RWKVConfig, default_ranks
from rwkv.training.strategy import grow_segments
from tests.bench_stores import relative, timed, tokens_of, whole_models

Tile = tuple[int, int, int, int, int]  # as of int8_triton.product
TILES = (
    (128, 256, 128, 8, 3),
    (128, 256, 128, 8, 4),
    (256, 128, 128, 8, 3),
    (256, 128, 64, 8, 4),
    (128, 128, 128, 4, 4),
)


def rescaled(
    sums: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    dtype: torch.dtype,
    into: Tensor | None = None,
) -> Tensor:
    """The formula of int8_rescale_triton.rescale."""
    out = sums.float() * row_scale
    if column_scale is not None:
        out = out * column_scale.view(1, -1)
    return out.to(dtype) if into is None else into.add_(out)


def by_torch(
    left: Tensor,
    row_scale: Tensor,
    right: Tensor,
    column_scale: Tensor | None,
    dtype: torch.dtype,
    into: Tensor | None = None,
) -> Tensor:
    """As peft.int8_triton.product, by torch's product of whole numbers."""
    kernels = triton_kernels("tests.int8_rescale_triton", "int8", left)
    run = rescaled if kernels is None else kernels.rescale
    out: Tensor = run(torch._int_mm(left, right.T), row_scale, column_scale, dtype, into)
    return out


def by_triton(*given: Any, tile: Tile) -> Tensor:
    """peft.int8_triton.product; on a CPU torch's."""
    kernels = triton_kernels("peft.int8_triton", "int8", given[0])
    out: Tensor = by_torch(*given) if kernels is None else kernels.product(*given, tile=tile)
    return out


class PlainDense(RowStore):
    """Unpacked by torch's own passes, through float32."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scale).to(dtype)


class WholeNumbers(RowStore):
    """int8 times int8: activations are rounded with a scale a token, the gradient too.

    The scales of W's rows lie along the summed side of the gradient's product, so they go into the
    gradient before it is rounded, as in peft.store_fp8.

    kernels: what multiplies, as peft.int8_triton; torch._int_mm, whose sums go through memory.
    """

    kernels: Any = SimpleNamespace(product=by_torch)

    def forward_product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        if not multiplies_whole_numbers(x, self.codes):
            return super().forward_product(x, into)
        left = rounded_rows("int8", x.flatten(0, -2))
        return whole_product(self.kernels, *left, self.codes, self.scale, like=x, into=into)

    def backward_product(
        self, grad: Tensor, into: Tensor | None = None, *, of_logits: bool = False
    ) -> Tensor:
        if not multiplies_whole_numbers(grad, self.codes):
            return super().backward_product(grad, into)
        left = rounded_rows("int8", grad.flatten(0, -2), self.scale.T)
        columns = transposed("int8", self.codes)
        return whole_product(self.kernels, *left, columns, None, like=grad, into=into)


class Blocks64(Store):
    """bitsandbytes' block-wise 8 bits.

    codes: uint8, one a weight. scale: float32, one a block. table: what a code means, [256].
    """

    BLOCK = 64
    LINEAR = False

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        from bitsandbytes import functional

        table = functional.create_linear_map(True, 8).to(weight.device) if self.LINEAR else None
        codes, state = functional.quantize_blockwise(weight, code=table, blocksize=self.BLOCK)
        return {"codes": codes, "scale": state.absmax, "table": state.code}

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional

        parts = self.tensors()
        state = functional.QuantState(
            absmax=parts["scale"], code=parts["table"], blocksize=self.BLOCK, dtype=dtype
        )
        out: Tensor = functional.dequantize_blockwise(parts["codes"], state)
        return out.view(self.shape)


class Blocks256(Blocks64):
    BLOCK = 256


class LinearBlocks64(Blocks64):
    LINEAR = True


def whole_numbers(tile: Tile) -> Callable[[str, Tensor], Store]:
    """WholeNumbers with our Triton product."""

    def make(kind: str, weight: Tensor) -> Store:
        store = WholeNumbers(kind, weight)
        store.kernels = SimpleNamespace(product=partial(by_triton, tile=tile))
        return store

    return make


CANDIDATES: dict[str, Callable[[str, Tensor], Store]] = {  # name: from kind and weight
    "dense, plain torch": PlainDense,
    "dense, Triton": RowStore,
    "whole, torch._int_mm": WholeNumbers,
    **{f"whole, Triton {tile}": whole_numbers(tile) for tile in TILES},
    "blocks of 64": Blocks64,
    "blocks of 256": Blocks256,
    "blocks of 64, linear": LinearBlocks64,
}
MODELS = ("dense, Triton", "whole, torch._int_mm", "blocks of 64", "blocks of 64, linear")


def multiplies_whole_numbers(x: Tensor, codes: Tensor) -> bool:
    """Whether there are enough rows, and sides that the products take."""
    rows = x.numel() // max(x.shape[-1], 1)
    return rows >= LEAST_ROWS and all(side % SIDE == 0 for side in codes.shape)


def products(sides: tuple[int, int], tokens: int, device: str) -> None:
    """A table of one weight [out, in], bfloat16."""
    out_features, in_features = sides
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.empty(shape, device=device, dtype=torch.bfloat16)
        return values.normal_(generator=draw)

    weight, x = normal(out_features, in_features) * 0.02, normal(tokens, in_features)
    grad, before = normal(tokens, out_features), normal(tokens, out_features)
    exact, exact_grad = x @ weight.T, grad @ weight
    print(
        f"{[out_features, in_features]}, {tokens} tokens, bfloat16\n"
        f"{'candidate':<40}  bits  error of weight  forward ms  and added  backward ms"
        "  error of output  of gradient"
    )
    times = [
        timed(lambda: x @ weight.T),
        timed(lambda: before.addmm_(x, weight.T, beta=0.5)),
        timed(lambda: grad @ weight),
    ]
    print(f"{'bfloat16':<40}{row(16, 0, times, 0, 0)}")
    for name, make in CANDIDATES.items():
        try:
            store = make("int8", weight)
            wrong = relative(store.forward_product(x), exact)
            wrong_grad = relative(store.backward_product(grad), exact_grad)
            into = torch.zeros_like(exact)
            assert relative(store.forward_product(x, into), store.forward_product(x)) < 1e-2
            times = [
                timed(lambda store=store: store.forward_product(x)),
                timed(lambda store=store, into=into: store.forward_product(x, into)),
                timed(lambda store=store: store.backward_product(grad)),
            ]
        except Exception as error:  # of a compiler: the other candidates are measured still
            print(f"{name:<40}{type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        bits = store.bytes() * 8 / weight.numel()
        error = relative(store.dense(torch.bfloat16), weight)
        print(f"{name:<40}{row(bits, error, times, wrong, wrong_grad)}", flush=True)


def row(bits: float, error: float, times: list[float], wrong: float, wrong_grad: float) -> str:
    forward, added, backward = times
    return (
        f"{bits:6.2f}{error:17.4f}{forward:12.3f}{added:11.3f}{backward:13.3f}{wrong:17.4f}"
        f"{wrong_grad:13.4f}"
    )


def models(options: argparse.Namespace, device: str) -> None:
    """Logits and gradients of whole models over some candidates, the first being what int8 was."""
    config = RWKVConfig(
        version=7,
        n_layer=options.layers,
        n_embd=options.channels,
        dim_ffn=4 * options.channels,
        vocab_size=options.vocabulary,
        ranks=default_ranks(7, options.channels),
    )
    keys = {"device": device, "backend": "auto"}
    if options.model:
        vocabulary = config_of(read_tensors(options.model)).vocab_size
    for name in MODELS:
        with patch.object(peft.apply, "make_store", CANDIDATES[name]):
            whole_models(
                f"{config.name}, random; int8 is {name}",
                lambda flags, dtype: random_with_profile(config, flags, dtype=dtype, **keys)[0],
                tokens_of(options.vocabulary, "", options),
                device,
                ("int8",),
            )
            if options.model:
                whole_models(
                    f"{Path(options.model).name}; int8 is {name}",
                    lambda flags, dtype: load_with_profile(
                        options.model, flags, dtype=dtype, **keys
                    )[0],
                    tokens_of(vocabulary, options.text, options),
                    device,
                    ("int8",),
                )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sides", type=int, nargs="+", default=(16384, 4096, 4096, 16384), help="out in, out in"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the products")
    parser.add_argument("--model", default="", help="a model with real weights")
    parser.add_argument("--text", default="", help="a file whose bytes --model reads; else random")
    parser.add_argument("--layers", type=int, default=24, help="of the random model (0.4B's)")
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--scored", type=int, default=512, help="tokens that a model is scored on")
    parser.add_argument("--context", type=int, default=128, help="tokens that it reads before them")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        grow_segments()
    print(torch.cuda.get_device_name() if device == "cuda" else "cpu")
    for sides in zip(options.sides[::2], options.sides[1::2], strict=True):
        products(sides, options.tokens, device)
    options.tokens = options.scored
    models(options, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
