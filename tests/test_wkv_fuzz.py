"""Every wkv backend on whatever finite numbers RWKV can make: no NaN, no infinity, no lost digits.

A call's lengths, packing, sizes and decays are drawn from its seed. Without a GPU the CUDA kernels
run in the emulator, and the Triton kernels in its interpreter, in a process of its own.
"""

import importlib
import os
import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from helpers import pass_in_the_interpreter, with_gradients
from torch import Tensor
from torch.nn import functional as F

from rwkv.ops import cuda_build

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
# Sizes of numbers. What is compared has none so small that a product of two has no float32.
WILD, SANE = (0.0, 1e-30, 1e-6, 1.0, 1e4), (1e-6, 1.0, 1e4)
SMALLEST = 2.0**-14  # of float16 numbers with all their digits
ALLOWED = {BFLOAT16: 5e-3, FLOAT32: 2e-5}  # as in tests/test_wkv_triton.py


class Draws:
    """Random numbers of one call."""

    def __init__(self, seed: int, sizes: Sequence[float]):
        self.choose, self.sizes = random.Random(seed), sizes
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def one_of(self, values: Sequence[float], shape: Sequence[int]) -> Tensor:
        """One of `values` for all, or for each token, head, channel or any of their pairs."""
        shape = [n if self.choose.random() < 0.4 else 1 for n in shape]
        which = torch.randint(len(values), shape, generator=self.generator)
        return torch.tensor(values, dtype=torch.float64)[which]

    def tensor(self, *shape: int) -> Tensor:
        """Normal, equal in all tokens, nearly so, or all alike; times sizes, with some zeros."""
        x, first = self.normal(*shape), self.normal(*shape[:1], 1, *shape[2:])
        kind = self.choose.choice(["normal", "normal", "equal", "nearly equal", "ones"])
        if kind == "ones":
            x = torch.ones(shape, dtype=torch.float64)
        elif kind != "normal":
            x = first + (0.01 * x if kind == "nearly equal" else 0 * x)
        if self.choose.random() < 0.2:
            x = x * (self.normal(*shape) > 0)
        return x * self.one_of(self.sizes, shape)


class Call(NamedTuple):
    """An operator's inputs, and what flows back into its outputs."""

    inputs: dict[str, Tensor]
    state: Tensor
    cu_seqlens: Tensor | None
    flows: tuple[Tensor, Tensor]


def draw_call(op: str, seed: int, sizes: Sequence[float], N: int, dtype, device) -> Call:
    """Inputs as RWKV's time mix makes them, of any size: rows or packed texts of 1 to 100 tokens."""
    draws = Draws(seed, sizes)
    lengths = [draws.choose.choice([1, 2, 17, 63, 64, 65, 100]) for _ in range(2)]
    packed = draws.choose.random() < 0.5
    if packed:
        lengths = [*lengths, 1]
        draws.choose.shuffle(lengths)
    B, T, H = (1, sum(lengths), 1) if packed else (2, lengths[0], 1)
    Q = len(lengths) if packed else B
    shape = (B, T, H, N)
    x = {name: draws.tensor(*shape) for name in "rkv"}
    if op == "wkv7":
        decay = draws.one_of((-1e4, -5.0, 0.0, 5.0, 1e4), shape) + draws.normal(*shape)
        kk = F.normalize(draws.tensor(*shape), dim=-1)
        iclr = torch.sigmoid(draws.one_of((-1e4, 0.0, 1e4), shape) + draws.normal(*shape))
        x |= {"w": -F.softplus(-decay) - 0.5, "a": -kk, "b": kk * iclr}
    else:
        decays = (-1e4, -20.0, -2.0, 0.0, 1.0, 3.0, 20.0, 1e4)
        x["w"] = draws.one_of(decays, shape) + draws.normal(*shape)
        x["u"] = draws.tensor(1, 1, H, N).view(H, N)
    state = draws.tensor(Q, 1, H, N * N).view(Q, H, N, N)
    flows = draws.tensor(*shape), draws.tensor(Q, 1, H, N * N).view(Q, H, N, N)
    inputs = {name: tensor.to(device, dtype) for name, tensor in x.items()}
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device) if packed else None
    flows = flows[0].to(device, dtype), flows[1].to(device, FLOAT32)
    return Call(inputs, state.to(device, FLOAT32), ends, flows)


def run(op: str, backend: str, call: Call) -> dict[str, Tensor]:
    module = importlib.import_module(f"rwkv.ops.{op}_{backend}")
    return with_gradients(
        module.run, call.inputs, call.state, call.flows, cu_seqlens=call.cu_seqlens
    )


def in_float64(op: str, call: Call, *, largest: bool = False) -> dict[str, Tensor]:
    """The reference in float64; with `largest` all results as they are where no terms cancel.

    There numbers count as at least SMALLEST of the largest of their tensor, a state's as that of
    the largest that a token adds to it: tiles have one scale.
    """
    tensors = {n: x.double() for n, x in (call.inputs | {"state": call.state}).items()}
    flows = [x.double() for x in call.flows]
    if largest:
        most = {name: x.abs().max() for name, x in tensors.items()}
        tensors = {
            name: x if name == "w" else x.abs() + SMALLEST * most[name]
            for name, x in tensors.items()
        }
        tensors["state"] += SMALLEST * most["k"] * most["v"]
        most_y, most_state = (x.abs().max() for x in flows)
        flows = [x.abs() + SMALLEST * x.abs().max() for x in flows]
        flows[1] += SMALLEST * most["r"] * most_y
        flows[0] += 0 * most_state
    state = tensors.pop("state")
    return run(op, "reference", Call(tensors, state, call.cu_seqlens, tuple(flows)))


def excess(op: str, got: dict[str, Tensor], call: Call) -> dict[str, float]:
    """Errors against float64, relative to the largest that they could be: sums without signs."""
    want, bound = in_float64(op, call), in_float64(op, call, largest=True)
    return {
        name: ((got[name].double() - x).square().mean() / bound[name].square().mean()).sqrt().item()
        for name, x in want.items()
    }
