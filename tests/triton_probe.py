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


def heads(op: str, dtype: torch.dtype, C: int) -> None:
    """What stands around wkv; all trains."""
    from rwkv.ops import activation, head_output, wkv7_inputs

    fused.uses_kernels = activation.uses_kernels = lambda *_: True
    rows, N = (1, 32), 64

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    names = ("r", "k", "v", "v_first", "decay", "iclr", "value")
    given = {name: drawn(*rows, C) for name in names}
    given |= {name: drawn(C) for name in ("w0", "a0", "v0", "k_k", "k_a")}
    made = wkv7_inputs.wkv7_inputs(**given, r_k=drawn(C // N, N))
    norm, y = torch.nn.GroupNorm(C // N, C, dtype=dtype), drawn(*rows, C // N, N)
    results = [
        *made,
        head_output.head_output7(y, norm, made.bonus, made.v_again, drawn(*rows, C)),
        head_output.head_output6(y, norm, drawn(*rows, C)),
        activation.squared_relu(drawn(*rows, 4 * C)),
        activation.gated_sum(*(drawn(*rows, C) for _ in range(3))),
    ]
    sum(x.float().sum() for x in results).backward()


def adapters(op: str, dtype: torch.dtype, rank: int) -> None:
    """LoRA's and Bone's kernels of a rank, as far as there are some."""
    from peft import block_sums_triton, bone_triton
    from rwkv.ops import low_rank_triton

    n, C = 256, 1024
    x, low = torch.randn(n, C, dtype=dtype), torch.randn(n, rank, dtype=dtype)
    if low_rank_triton.fits(x, rank):
        for activated in (False, True):
            factor = torch.randn(C, rank, dtype=dtype).T
            low_rank_triton.plus_product(x, low, factor, x, activated=activated)
    block_sums_triton.add_to_blocks(x, block_sums_triton.sum_of_blocks(x, rank))
    G = torch.randn(C // rank, rank, rank, dtype=dtype)
    if bone_triton.fits(G):
        bone_triton.mix(x, G)
        bone_triton.unmix(x, low, x, G)


def stores(op: str, dtype: torch.dtype, width: int) -> None:
    """What unpacks and rounds weights."""
    from peft import fpx_triton, rows_triton
    from peft.store_fpx import BLOCK, FORMATS
    from peft.store_rows import CODES, LARGEST, TINY
    from peft.stores import make_store

    weight = torch.randn(64, width, dtype=dtype)
    whole = {"largest": LARGEST["int8"], "tiny": TINY, "dtype": torch.int8}
    rows_triton.round_rows(weight, None, **whole)  # e4m3 only GPUs write that have it
    for kind in CODES:
        made = make_store(kind, weight)
        rows_triton.unpack(made.codes, made.scale, dtype)
        rows_triton.transpose(made.codes)
    for kind, bits in FORMATS.items():
        made = make_store(kind, weight)
        fpx_triton.unpack(
            *(made.low, made.high, made.scale),
            total=weight.numel(),
            one=made._one(),
            bits=bits,
            block=BLOCK,
            dtype=dtype,
        )


def tokens(op: str, dtype: torch.dtype, V: int) -> None:
    """Scores of a vocabulary's logits, and drawing from them."""
    from rwkv.ops import logit_scores_triton, picking_triton
    from rwkv.sampling_flags import Sampling

    logits, targets = torch.randn(4, V, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    for temperature in (None, 2.0):
        logit_scores_triton.read_logits(logits, targets, temperature)
    rows = torch.zeros(4, dtype=torch.int64)
    picking_triton.uniform_numbers(0, rows, rows)
    counts, banned = torch.zeros(4, V), torch.zeros(V, dtype=torch.bool)
    for sampling in (Sampling(temperature=0), Sampling(top_k=50, top_p=0.3, penalty_decay=0.99)):
        uniforms = torch.zeros(4, dtype=torch.float64)
        picking_triton.pick(logits, sampling, uniforms, counts, banned)


def training(op: str, dtype: torch.dtype, width: int) -> None:
    """The norm of gradients and AdamW's step, over sizes of multiples of 16 and others."""
    from rwkv.ops.many_tensors_triton import squares
    from rwkv.training.optimizer import FusedAdamW, MasterWeights

    for size in (width, width + 1):
        parameter = torch.randn(size, dtype=dtype, requires_grad=True)
        parameter.grad = torch.randn(size, dtype=dtype)
        optimizer = MasterWeights(
            [{"params": [parameter]}],
            lambda groups: FusedAdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-8),
        )
        optimizer.clip(squares([parameter.grad]).sum().sqrt(), 1.0)
        optimizer.step()


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


MAKE = {
    "heads": heads,
    "adapters": adapters,
    "stores": stores,
    "tokens": tokens,
    "training": training,
}


if __name__ == "__main__":
    ops, dtype, channels, gpu = sys.argv[1:]
    amd = gpu.startswith("gfx")
    if amd:
        torch.version.hip = "0"  # before the operators are imported, which ask for it
    driver.set_active(Absent(GPUTarget("hip", gpu, 64) if amd else GPUTarget("cuda", int(gpu), 32)))
    cuda_build.too_small = lambda device, shared: "no room" if shared > ROOM[gpu] else None
    for op, C in product(ops.split(","), map(int, channels.split(","))):
        make = MAKE.get(op, mixes if op in MIXES else wkv)
        found = compile_kernels(partial(make, op, getattr(torch, dtype), C))
        sys.stdout.writelines(f"{op} {C} {kernel} {shared}\n" for kernel, shared in found.items())
