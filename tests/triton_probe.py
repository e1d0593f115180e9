"""Compile an operator's Triton kernels for a GPU that is not there, and print what they take.

    python tests/triton_probe.py wkv7 bfloat16 64 86
    python tests/triton_probe.py wkv7 bfloat16 64 gfx942
    python tests/triton_probe.py time6,channel6 bfloat16 2048,4096 86

The arguments are operators (wkv7, wkv6, or the norm and mixes in front of a version's time mix or
channel mix), dtype, channels of a head or of all, and NVIDIA's compute capability or AMD's
architecture, of wavefronts of 64. Each line is an operator, channels, a kernel and its bytes of
shared memory a block. In a process of its own, for the compiler's target holds for all of one.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from helpers import random_state, wkv6_inputs, wkv7_inputs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from rwkv.ops import cuda_build, fused, low_rank

# bytes of shared memory of a block
ROOM = {"80": 163 << 10, "86": 99 << 10, "90": 227 << 10, "gfx942": 64 << 10}
INPUTS = {"wkv7": wkv7_inputs, "wkv6": wkv6_inputs}
MIXES = {"time7": 6, "time6": 5, "channel7": 1, "channel6": 2}
RANK = 64  # of the largest RWKV-6's mixes


class Absent:
    """What the compiler asks of a GPU."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def wkv(op: str, dtype: torch.dtype, N: int) -> None:
    """A forward and a backward pass of an operator."""
    inputs = INPUTS[op](B=1, T=128, H=1, N=N, dtype=dtype)
    leaves = [x.requires_grad_() for x in (*inputs.values(), random_state(inputs))]
    y, last, *_ = import_module(f"rwkv.ops.{op}_triton")._forward(*leaves, None, False)
    torch.autograd.grad(y.float().sum() + last.sum(), leaves)


def mixes(op: str, dtype: torch.dtype, C: int) -> None:
    """Both passes, of rows and of packed texts; all trains."""
    from rwkv.ops.norm_mix import norm_shift_mix, norm_shift_mix_by_data

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    fused.uses_kernels = lambda *_: True
    low_rank.uses_kernels = lambda *_: False
    x, norm, shift = drawn(1, 32, C), torch.nn.LayerNorm(C, dtype=dtype), drawn(1, C)
    shares = [drawn(1, 1, C) for _ in range(MIXES[op])]
    if op == "time6":
        low, high = drawn(C, 5 * RANK), drawn(5, RANK, C)
        parameters = (x, norm, shift, drawn(C), low, high, shares)
        run: Callable[..., Any] = norm_shift_mix_by_data
    else:
        parameters, run = (x, norm, shift, shares), norm_shift_mix
    for texts in (None, torch.tensor([0, 32])):
        stream, mixed, last = run(*parameters, texts)
        sum(x.float().sum() for x in (stream, *mixed, last)).backward()


def compile_kernels(run: Callable[[], None]) -> dict[str, int]:
    """The most shared memory of each kernel that is launched; none runs."""
    taken: dict[str, int] = {}
    launch = JITFunction.run

    def compiled(kernel: Any, *args: Any, **options: Any) -> Any:
        made = launch(kernel, *args, **options | {"warmup": True})
        assert made.asm.keys() & {"cubin", "hsaco"}
        taken[kernel.fn.__name__] = max(taken.get(kernel.fn.__name__, 0), made.metadata.shared)
        return made

    JITFunction.run = compiled
    run()
    JITFunction.run = launch
    return taken


if __name__ == "__main__":
    ops, dtype, channels, gpu = sys.argv[1:]
    amd = gpu.startswith("gfx")
    if amd:
        torch.version.hip = "0"  # before the operators are imported, which ask for it
    driver.set_active(Absent(GPUTarget("hip", gpu, 64) if amd else GPUTarget("cuda", int(gpu), 32)))
    cuda_build.too_small = lambda device, shared: "no room" if shared > ROOM[gpu] else None
    for op, C in product(ops.split(","), map(int, channels.split(","))):
        make = mixes if op in MIXES else wkv
        found = compile_kernels(partial(make, op, getattr(torch, dtype), C))
        sys.stdout.writelines(f"{op} {C} {kernel} {shared}\n" for kernel, shared in found.items())
