"""Every wkv backend on whatever finite numbers RWKV can make: no NaN, no infinity, no lost digits.

A call's lengths, packing, sizes and decays are drawn from its seed. Without a GPU the CUDA kernels
run in the emulator, and the Triton kernels in its interpreter, in a process of its own.
"""

import importlib
import os
import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
from helpers import (
    assert_all_close,
    pass_in_the_interpreter,
    random_state,
    with_gradients,
    wkv6_inputs,
    wkv7_inputs,
)
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
    """Inputs as RWKV's time mix makes them, of rows or packed texts of 1 to 100 tokens."""
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
    """Outputs, last state and all gradients."""
    backend_run = importlib.import_module(f"rwkv.ops.{op}_{backend}").run
    return with_gradients(
        backend_run, call.inputs, call.state, call.flows, cu_seqlens=call.cu_seqlens
    )


def in_float64(op: str, call: Call) -> dict[str, Tensor]:
    inputs = {name: x.double() for name, x in call.inputs.items()}
    flows = (call.flows[0].double(), call.flows[1].double())
    return run(op, "reference", Call(inputs, call.state.double(), call.cu_seqlens, flows))


def without_signs(call: Call) -> Call:
    """The call whose results are sums of the same terms, none of which cancel.

    All numbers count as at least SMALLEST of the largest of their tensor, and a state's also as
    that share of the largest that a token adds to it: a tile has one scale.
    """

    def floored(x: Tensor, *others: Tensor) -> Tensor:
        least = x.abs().max()
        if others:
            least = least + others[0].abs().max() * others[1].abs().max()
        return x.abs() + SMALLEST * least

    x = {name: t.double() for name, t in call.inputs.items()}
    grad_y, grad_state = (t.double() for t in call.flows)
    return Call(
        {name: t if name == "w" else floored(t) for name, t in x.items()},
        floored(call.state.double(), x["k"], x["v"]),
        call.cu_seqlens,
        (floored(grad_y), floored(grad_state, x["r"], grad_y)),
    )


def largest_results(op: str, call: Call) -> dict[str, Tensor]:
    """What no result's terms can add up to more than.

    The gradient of a decay of wkv7 is what is left of the shares of all tokens in that of their sum
    L, x dx, after those cancel that the decay has no part in.
    """
    bound = without_signs(call)
    most = in_float64(op, bound)
    if op == "wkv7":
        shares = sum(bound.inputs[name] * most[f"d_{name}"] for name in "rkab")
        rate = torch.exp(bound.inputs["w"])
        most["d_w"] = most["d_w"].abs() + rate * shares.sum(1, keepdim=True)
    return most


def check_finite(op: str, backend: str, seeds: Sequence[int], N: int, dtype, device: str) -> None:
    for seed in seeds:
        got = run(op, backend, draw_call(op, seed, WILD, N, dtype, device))
        bad = {name: int((~x.isfinite()).sum()) for name, x in got.items()}
        assert not any(bad.values()), f"seed {seed}: numbers that are not finite: {bad}"


def check_close(op: str, backend: str, seeds: Sequence[int], N: int, dtype, device: str) -> None:
    """Errors are small beside the largest that the terms of a result could add up to."""
    for seed in seeds:
        call = draw_call(op, seed, SANE, N, dtype, device)
        got, want = run(op, backend, call), in_float64(op, call)
        for name, most in largest_results(op, call).items():
            error = (got[name].double() - want[name]).square().mean().sqrt().item()
            allowed = ALLOWED[dtype] * most.square().mean().sqrt().item()
            assert error <= allowed, f"seed {seed}: {name} is off by {error:.2e} of {allowed:.2e}"


operators = pytest.mark.parametrize("op", ["wkv7", "wkv6"])
# Seeds of either check. The few hold calls whose results were not finite once.
FEW, MANY = (range(2, 7), range(2)), (range(100), range(20))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in another process")


@pytest.fixture
def emulated_cuda(emulated, monkeypatch):
    """The CUDA backends run in the emulator, each kernel once."""
    load = partial(emulated, check_order=False)
    monkeypatch.setattr(cuda_build, "load", lambda source, macros, _: load(source, macros))


def check(op: str, backend: str, seeds: Sequence[Sequence[int]], N: int, dtype, device: str):
    check_finite(op, backend, seeds[0], N, dtype, device)
    check_close(op, backend, seeds[1], N, dtype, device)


@operators
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_torch_stays_finite_and_close(op, backend):
    check(op, backend, (range(100), range(20)), 16, BFLOAT16, "cpu")


@operators
def test_emulated_cuda_kernels_stay_finite_and_close(op, emulated_cuda):
    check(op, "cuda", FEW, 64, BFLOAT16, "cpu")


@interpreted
@operators
def test_interpreted_triton_kernels_stay_finite_and_close(op):
    check(op, "triton", FEW, 16, BFLOAT16, "cpu")


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-k", "interpreted")


KERNELS = [
    ("cuda", 64, BFLOAT16),
    *(("triton", N, dtype) for N in (64, 128) for dtype in (BFLOAT16, FLOAT32)),
]


@pytest.mark.gpu
@operators
@pytest.mark.parametrize("backend, N, dtype", KERNELS)
def test_kernels_stay_finite_and_close(op, backend, N, dtype):
    check(op, backend, MANY, N, dtype, "cuda")


def check_zeros(op: str, backend: str, N: int, dtype, device: str) -> None:
    """What divides a tile by its largest number has none to divide by, and decays at full."""
    draw = wkv7_inputs if op == "wkv7" else wkv6_inputs
    for names in ("r", "k", "v", "kv"):
        x = draw(B=1, T=192, H=1, N=N, dtype=dtype, device=device)
        x["w"][:, 64:128] = -0.5 if op == "wkv7" else 0.7  # the most that has one point a chunk
        for name in names:
            x[name][:, 64:128] = 0
        state = random_state(x)
        grad_y = torch.randn(x["v"].shape, generator=torch.Generator().manual_seed(3))
        call = Call(x, state, None, (grad_y.to(x["v"]), state))
        assert_all_close(run(op, backend, call), in_float64(op, call), ALLOWED[dtype])


@operators
def test_a_chunk_of_zeros_at_the_strongest_decay(op, emulated_cuda):
    check_zeros(op, "torch", 16, FLOAT32, "cpu")
    check_zeros(op, "cuda", 64, BFLOAT16, "cpu")


@interpreted
@operators
def test_a_chunk_of_zeros_at_the_strongest_decay_interpreted(op):
    check_zeros(op, "triton", 16, BFLOAT16, "cpu")


@pytest.mark.gpu
@operators
@pytest.mark.parametrize("backend, N, dtype", KERNELS)
def test_a_chunk_of_zeros_at_the_strongest_decay_on_a_gpu(op, backend, N, dtype):
    check_zeros(op, backend, N, dtype, "cuda")
