"""Time, memory and error of the wkv backends, as a table.

    python -m tests.bench_wkv
    python -m tests.bench_wkv --op wkv6 --shapes 1,512,12,64 8,128,4,32 --backends torch reference
    python -m tests.bench_wkv --device cuda --shapes 8,4096,32,64 --text_length 700

Columns: milliseconds forward, and forward with backward (median; on a GPU of the kernels alone,
which is kept waiting while they are launched); how many times as fast as the backend of --against
that is; the bytes that must move at the device's measured copy speed as a share of the time taken
(GPU only); MiB that a forward pass keeps for its backward pass, inputs not counted; and the largest
relative error of the outputs, and of the gradients, against the reference in float64 (for shapes of
up to ERROR_SIZE numbers).

Beside the backends stand flash-linear-attention's functions as they are called without this
repository (`fla alone`), which reads the decay's logarithm and its own order of the state, and for
wkv7 the same with everything kept for the backward pass (`fla keeping`), its fastest.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rwkv import cli
from rwkv.errors import InputError
from rwkv.ops import wkv6, wkv7, wkv7_fla
from tests.helpers import random_state, with_gradients, wkv6_inputs, wkv7_inputs

DRAWN = 4096  # most tokens that are drawn for a large shape
ERROR_SIZE = 1 << 21  # B T H N above which the reference in float64 takes too long
WAIT = 20_000_000  # clock ticks, some 11 ms: longer than a call's launches take the host
SHAPES = {
    "cpu": ["1,512,12,64", "4,512,12,64", "2,512,4,32", "1,4096,12,64"],
    "cuda": [
        *(f"{B},4096,{H},64" for H in (32, 64) for B in (1, 4, 8)),
        "16,1024,32,64",
        "16,1024,64,64",
        *(f"1,65536,{H},64" for H in (32, 64)),
    ],
}
OPS = {
    "wkv7": (wkv7.wkv7, wkv7.BACKENDS, wkv7_inputs),
    "wkv6": (wkv6.wkv6, wkv6.BACKENDS, wkv6_inputs),
}
AGAINST = {"cpu": "reference", "cuda": "fla"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """The median time of `repeats` runs after two that are not counted.

    On a GPU without that of launching, for the GPU is kept waiting meanwhile.
    """
    run(), run()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(WAIT)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def fla_alone(op: str, **keys: object) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """flash-linear-attention's function, of inputs in its own form."""
    if op == "wkv6":
        from fla.ops.rwkv6 import chunk_rwkv6 as call
    else:
        from fla.ops.rwkv7 import chunk_rwkv7 as call

        keys["lower_bound"] = wkv7_fla.LOWEST

    def run(
        state: Tensor, cu_seqlens: Tensor | None, **inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        packing = None if cu_seqlens is None else cu_seqlens.long()
        found: tuple[Tensor, Tensor | None] = call(
            **inputs, scale=1.0, initial_state=state, cu_seqlens=packing, **keys
        )
        return found

    return run


def contenders(options: argparse.Namespace) -> dict[str, tuple[Callable[..., Any], bool]]:
    """What is measured by its name: (its call, whether it takes fla's form of the inputs)."""
    op, table, _ = OPS[options.op]
    on_gpu = options.device == "cuda"
    named = options.backends or [n for n in table if not (on_gpu and n == "reference")]
    found: dict[str, tuple[Callable[..., Any], bool]] = {
        name: (partial(op, backend=name), False) for name in named
    }
    if on_gpu and "fla" in named and find_spec("fla") is not None:
        found["fla alone"] = fla_alone(options.op), True
        if options.op == "wkv7":
            found["fla keeping"] = fla_alone(options.op, disable_recompute=True), True
    return found


def copy_speed(device: str) -> float:
    """Bytes read and written a millisecond by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), device, 20)


def bytes_moved(inputs: dict[str, Tensor], state: Tensor) -> tuple[int, int]:
    """The fewest bytes a forward and a backward pass can read and write."""
    tensors = sum(x.nbytes for x in inputs.values())
    y, states = inputs["v"].nbytes, state.nbytes
    forward = tensors + y + 2 * states
    return forward, 2 * tensors + y + 3 * states


def kept_bytes(run: Callable[[], object], given: list[Tensor]) -> int:
    """What autograd keeps of a forward pass beyond the tensors it was given, each storage once."""
    mine = {x.untyped_storage().data_ptr() for x in given}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in mine:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
        return sum(x.untyped_storage().nbytes() for x in kept.values())


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, float]:
    """The largest relative error of the outputs, and of the gradients."""

    def error(name: str) -> float:
        difference = got[name].double() - want[name]
        return (difference.norm() / want[name].norm().clamp_min(1e-30)).item()

    outputs = [error(name) for name in want if not name.startswith("d_")]
    return max(outputs), max(error(name) for name in want if name.startswith("d_"))


def parse_shape(text: str) -> tuple[int, int, int, int]:
    try:
        B, T, H, N = (int(size) for size in text.split(","))
    except ValueError:
        raise InputError(f"--shapes {text}: is not B,T,H,N such as 8,4096,32,64") from None
    return B, T, H, N


def inputs_of(options: argparse.Namespace, B: int, T: int, H: int, N: int) -> dict[str, Tensor]:
    """Random inputs; large ones repeat a few rows, for drawing would outlast the measurement."""
    make = partial(OPS[options.op][2], H=H, N=N, device=options.device)
    some = next(t for t in (min(T, DRAWN), T) if T % t == 0)
    if B * T * H * N <= ERROR_SIZE:
        return make(B=B, T=T, dtype=DTYPES[options.dtype])
    drawn = make(B=1, T=some, dtype=DTYPES[options.dtype])
    return {n: x.repeat(B, T // some, 1, 1) if x.ndim == 4 else x for n, x in drawn.items()}


def bench_shape(
    options: argparse.Namespace, shape: tuple[int, int, int, int], speed: float | None
) -> None:
    """Print a row for each backend."""
    B, T, H, N = shape
    label = ",".join(map(str, shape))
    if options.text_length:
        B, T = 1, B * T
    device = options.device
    inputs = inputs_of(options, B, T, H, N)
    cu_seqlens, Q = None, B
    if options.text_length:
        starts = torch.arange(0, T, options.text_length, device=device)
        cu_seqlens, Q = torch.cat([starts, starts.new_tensor([T])]), len(starts)
    state = random_state(inputs, Q=Q, scale=0.1)
    leaves = {name: x.requires_grad_() for name, x in (inputs | {"state": state}).items()}
    flow = torch.randn_like(inputs["v"])
    want = None
    if options.errors and B * T * H * N <= ERROR_SIZE:
        double = {name: x.detach().double() for name, x in inputs.items()}
        want = with_gradients(
            OPS[options.op][0],
            double,
            state.detach().double(),
            backend="reference",
            cu_seqlens=cu_seqlens,
        )

    rows: list[tuple[str, float, float, str, str, str]] = []
    for backend, (call, in_flas_form) in contenders(options).items():
        taken = leaves
        if in_flas_form:
            log_decay = -torch.exp(inputs["w"].detach().float()).to(inputs["w"].dtype)
            taken = leaves | {"w": log_decay.requires_grad_()}

        def forward(call: Callable[..., Any] = call, taken: dict[str, Tensor] = taken) -> Tensor:
            y: Tensor = call(**taken, cu_seqlens=cu_seqlens)[0]
            return y

        def both(forward: Callable[[], Tensor] = forward, taken: dict[str, Tensor] = taken) -> None:
            torch.autograd.grad(forward(), list(taken.values()), flow)

        try:
            with torch.no_grad():
                ms_forward = milliseconds(forward, device, options.repeats)
        except RuntimeError as error:
            if "cannot run here" not in str(error):
                raise
            reason = str(error).splitlines()[-1].partition(": ")[2]
            print(f"| {label} | {backend} | {reason} | | | | | |", flush=True)
            continue
        ms_both = milliseconds(both, device, options.repeats)
        kept = kept_bytes(forward, [*taken.values(), flow]) / 2**20
        share, wrong = "", ""
        if speed is not None:
            least, least_backward = bytes_moved(inputs, state)
            share = (
                f"{least / speed / ms_forward:.0%}, "
                f"{(least + least_backward) / speed / ms_both:.0%}"
            )
        if want is not None and not in_flas_form:
            plain = {name: x.detach() for name, x in inputs.items()}
            got = with_gradients(call, plain, state.detach(), cu_seqlens=cu_seqlens)
            wrong = "{:.1e}, {:.1e}".format(*errors(got, want))
        rows.append((backend, ms_forward, ms_both, share, f"{kept:.1f}", wrong))

    base = {backend: both for backend, _, both, *_ in rows}.get(options.against)
    for backend, ms_forward, ms_both, share, kept_text, wrong in rows:
        ratio = "" if base is None else f"{base / ms_both:.2f}"
        print(
            f"| {label} | {backend} | {ms_forward:.3f} | {ms_both:.3f} | "
            f"{ratio} | {share} | {kept_text} | {wrong} |",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench_wkv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", choices=OPS, default="wkv7")
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    parser.add_argument("--shapes", nargs="+", metavar="B,T,H,N", help="default: by device")
    parser.add_argument("--backends", nargs="+", help="default: all; on a GPU not the reference")
    parser.add_argument("--against", help="whose time is 1; default: reference, on a GPU fla")
    parser.add_argument(
        "--text_length", type=int, help="pack each shape's B T tokens as texts of this many"
    )
    parser.add_argument("--repeats", type=int, help="default: 5, on a GPU 30")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument("--errors", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(argv)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that PyTorch can use")
    for backend in options.backends or []:
        if backend not in OPS[options.op][1]:
            names = ", ".join(OPS[options.op][1])
            raise InputError(f"--backends {backend}: choose from {names}")
    shapes = [parse_shape(text) for text in options.shapes or SHAPES[options.device]]
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.repeats = options.repeats or (30 if gpu else 5)
    options.against = options.against or AGAINST[options.device]
    if options.threads:
        torch.set_num_threads(options.threads)

    speed = copy_speed("cuda") if gpu else None
    if speed is not None:
        where = f"{torch.cuda.get_device_name()}, copies at {speed / 1e9:.2f} TB/s"
    else:
        where = f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.op}, {options.dtype}, {where}, torch {torch.__version__}\n")
    print(
        "| B,T,H,N | backend | forward ms | with backward ms | times as fast as "
        f"{options.against} | bytes' share: forward, both | kept MiB | error: outputs, gradients |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        bench_shape(options, shape, speed)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
