"""Launch settings of the Triton kernels, each beside its neighbours, as a table.

    python -m tests.bench_launch wkv7
    python -m tests.bench_launch wkv6 --dtype float32 --head_size 128 --shape 8,4096,16
    python -m tests.bench_launch low_rank --rank 128 --shape 32768,8192

The settings that are used stand in each module's LAUNCH, by dtype and size. This command changes
one number at a time to the next smaller and larger one and runs all the operator's kernels, forward
and backward: milliseconds (median, kernels alone), in times of those of the settings in use, and
the largest relative difference of a result from theirs. What gains is written into LAUNCH by hand.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rwkv import cli
from rwkv.errors import InputError
from rwkv.ops import low_rank_triton, triton_chunks, wkv6, wkv6_triton, wkv7, wkv7_triton
from tests.bench_wkv import DTYPES, milliseconds
from tests.helpers import random_state, wkv6_inputs, wkv7_inputs

STEPS = {"STAGES": (1, 2, 3, 4), "num_stages": (1, 2, 3, 4)}  # others go by powers of two
LEAST = {"num_warps": 1}  # others: what a matrix product takes
MOST = {"num_warps": 16, "C": 64}
SHAPES = {"wkv7": "8,4096,32", "wkv6": "8,4096,32", "low_rank": "32768,2048"}


def neighbours(key: str, value: int) -> list[int]:
    """The next smaller and larger value of a setting."""
    if key in STEPS:
        return [n for n in (value - 1, value + 1) if n in STEPS[key]]
    return [n for n in (value // 2, 2 * value) if LEAST.get(key, 16) <= n <= MOST.get(key, 256)]


def numbers(settings: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the numbers of nested settings stand."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from numbers(value, (*path, key))
        else:
            yield (*path, key)


def at(settings: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The innermost settings that a path leads through."""
    for key in path[:-1]:
        settings = settings[key]
    return settings


def wkv_run(options: argparse.Namespace) -> Callable[[], tuple[Tensor, ...]]:
    """An operator's outputs and gradients through Triton."""
    op, make = {"wkv7": (wkv7.wkv7, wkv7_inputs), "wkv6": (wkv6.wkv6, wkv6_inputs)}[options.what]
    B, T, H = options.shape
    inputs = make(
        B=1, T=T, H=H, N=options.head_size, device=options.device, dtype=DTYPES[options.dtype]
    )
    inputs = {n: x.repeat(B, 1, 1, 1) if x.ndim == 4 else x for n, x in inputs.items()}
    leaves = inputs | {"state": random_state(inputs, scale=0.1)}
    flow = torch.randn_like(inputs["v"])
    for x in leaves.values():
        x.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        y, last = op(**leaves, backend="triton")
        return y.detach(), last.detach(), *torch.autograd.grad(y, list(leaves.values()), flow)

    return run


def low_rank_run(options: argparse.Namespace) -> Callable[[], tuple[Tensor, ...]]:
    """Products of low rank: alone, added, and added with the activation."""
    T, N = options.shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=options.device, dtype=DTYPES[options.dtype])

    before, low, factor = draw(T, N), draw(T, options.rank), draw(N, options.rank).T

    def run() -> tuple[Tensor, ...]:
        outs = tuple(torch.empty_like(before) for _ in range(3))
        for out, some, activated in zip(
            outs, (None, before, before), (False, False, True), strict=True
        ):
            low_rank_triton.plus_product(some, low, factor, out, activated=activated)
        return outs

    return run


def difference(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest relative one of all results."""
    pairs = zip(got, want, strict=True)
    return max(
        ((a - b).float().norm() / b.float().norm().clamp_min(1e-30)).item() for a, b in pairs
    )


def compare(options: argparse.Namespace) -> None:
    """Print a line for the settings in use and one for each neighbour."""
    dtype = DTYPES[options.dtype]
    if options.what == "low_rank":
        table, key, run = (
            low_rank_triton.LAUNCH,
            (dtype.itemsize, options.rank),
            low_rank_run(options),
        )
    else:
        module = wkv7_triton if options.what == "wkv7" else wkv6_triton
        table, key, run = module.LAUNCH, (dtype, options.head_size), wkv_run(options)
    if key not in table:
        raise InputError(f"{options.what}: has no settings for {key}; choose another dtype or size")
    used = table[key]
    want = run()
    base = milliseconds(run, options.device, options.repeats)
    print("| setting | in use | instead | ms | of the time in use | difference |")
    print("|---|---|---|---|---|---|")
    print(f"| all | | | {base:.3f} | 1 | {difference(run(), want):.1e} |", flush=True)
    for path in list(numbers(used)):
        value = at(used, path)[path[-1]]
        for other in neighbours(path[-1], value):
            table[key] = changed = copy.deepcopy(used)
            at(changed, path)[path[-1]] = other
            name = ".".join(path)
            try:
                wrong = difference(run(), want)
                spent = milliseconds(run, options.device, options.repeats)
                row = f"{spent:.3f} | {spent / base:.3f} | {wrong:.1e}"
            except Exception as error:  # that it does not fit is a result, too
                row = f"{type(error).__name__}: {str(error).splitlines()[0][:80]} | | "
            print(f"| {name} | {value} | {other} | {row} |", flush=True)
    table[key] = used


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench_launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=SHAPES)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--head_size", type=int, choices=(64, 128), default=64)
    parser.add_argument("--rank", type=int, default=64, help="of low_rank")
    parser.add_argument("--shape", help="B,T,H or rows,columns; default: " + str(SHAPES))
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that PyTorch can use")
    shape = options.shape or SHAPES[options.what]
    if options.device == "cpu" and not triton_chunks.INTERPRETED.value:
        raise InputError("--device cpu: needs Triton's interpreter; set TRITON_INTERPRET=1")
    try:
        options.shape = [int(size) for size in shape.split(",")]
    except ValueError:
        options.shape = []
    if len(options.shape) != len(SHAPES[options.what].split(",")):
        raise InputError(f"--shape {shape}: is not numbers such as {SHAPES[options.what]}")
    where = torch.cuda.get_device_name() if options.device == "cuda" else "interpreter"
    print(f"{options.what}, {options.dtype}, {shape}, {where}, torch {torch.__version__}\n")
    compare(options)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
