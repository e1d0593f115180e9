"""Compile a wkv operator's Triton kernels for a GPU that is not there, and print what they take.

    python tests/triton_probe.py wkv7 bfloat16 64 86
    python tests/triton_probe.py wkv7 bfloat16 64 gfx942

The arguments are operator, dtype, channels of a head, and NVIDIA's compute capability or AMD's
architecture, of wavefronts of 64. Each line is a kernel and its bytes of shared memory a block. In
a process of its own, for the compiler's target holds for all of one.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from helpers import random_state, wkv6_inputs, wkv7_inputs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

INPUTS = {"wkv7": wkv7_inputs, "wkv6": wkv6_inputs}


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


def compile_kernels(module: ModuleType, tensors: list[torch.Tensor]) -> dict[str, int]:
    """The most shared memory of each kernel in a forward and a backward pass; nothing runs."""
    taken: dict[str, int] = {}
    run = JITFunction.run

    def compiled(kernel: Any, *args: Any, **options: Any) -> Any:
        made = run(kernel, *args, **options | {"warmup": True})
        assert made.asm.keys() & {"cubin", "hsaco"}
        taken[kernel.fn.__name__] = max(taken.get(kernel.fn.__name__, 0), made.metadata.shared)
        return made

    JITFunction.run = compiled
    y, last, *_ = module._forward(*tensors, None, False)
    torch.autograd.grad(y.float().sum() + last.sum(), tensors)
    return taken


if __name__ == "__main__":
    op, dtype, N, gpu = sys.argv[1:]
    amd = gpu.startswith("gfx")
    if amd:
        torch.version.hip = "0"  # before the operators are imported, which ask for it
    driver.set_active(Absent(GPUTarget("hip", gpu, 64) if amd else GPUTarget("cuda", int(gpu), 32)))
    inputs = INPUTS[op](B=1, T=128, H=1, N=int(N), dtype=getattr(torch, dtype))
    leaves = [x.requires_grad_() for x in (*inputs.values(), random_state(inputs))]
    found = compile_kernels(import_module(f"rwkv.ops.{op}_triton"), leaves)
    sys.stdout.writelines(f"{kernel} {shared}\n" for kernel, shared in found.items())
