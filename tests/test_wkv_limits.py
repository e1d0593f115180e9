"""What the CUDA and the Triton kernels of wkv must hold at their limits: equal keys, 65,536 tokens,
more numbers than 31 bits count, CUDA graphs, torch.compile.

Without a GPU what is small enough runs in the emulator and in Triton's interpreter.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from helpers import (
    assert_all_close,
    assert_close,
    pass_in_the_interpreter,
    random_state,
    with_gradients,
    wkv6_inputs,
    wkv7_inputs,
)
from torch import Tensor
from torch.nn import functional as F

from rwkv.ops import cuda_build
from rwkv.ops.wkv6 import wkv6
from rwkv.ops.wkv7 import wkv7

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BFLOAT16 = torch.bfloat16
ALLOWED = 5e-3  # as in tests/test_wkv_cuda.py
# With equal keys and no decay, of da and db, where large terms cancel. A chunk computed in float64
# but for what the kernels round has 5.1e-3 to 6.1e-3: 4.3e-3 by rounding the factors that carry
# decays to bfloat16, 1.7e-3 each by rounding dA and the results.
ALLOWED_EQUAL = 8e-3
FUNCTIONS = {"wkv7": wkv7, "wkv6": wkv6}
INPUTS = {"wkv7": wkv7_inputs, "wkv6": wkv6_inputs}
DECAYS = {
    "wkv7": {
        "usual": lambda w: w,
        "none": lambda w: torch.full_like(w, -9.0),
        "strongest": lambda w: torch.full_like(w, -0.5),
        "none or strongest": lambda w: torch.where(w > w.median(), -0.5, -9.0),
    },
    "wkv6": {
        "usual": lambda w: w,
        "none": lambda w: torch.full_like(w, -20.0),
        "w = 1.5": lambda w: torch.full_like(w, 1.5),
        "-20 to 20": lambda w: 20 * torch.sin(1e3 * w),
    },
}

operators = pytest.mark.parametrize("op", ["wkv7", "wkv6"])
on_gpu = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]
)
emulated_or_interpreted = pytest.mark.parametrize(
    "backend, device",
    [
        ("cuda", "cpu"),
        pytest.param(
            *("triton", "cpu"),
            marks=pytest.mark.skipif(not INTERPRETED, reason="runs in another process"),
            id="interpreted",
        ),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("cuda", "triton")),
    ],
)


@pytest.fixture(autouse=True)
def _emulated_on_a_cpu(request, monkeypatch):
    """On a CPU the CUDA kernels are emulated, each launched once."""
    case = getattr(request.node, "callspec", None)
    given = case.params if case is not None else {}
    if (given.get("backend"), given.get("device")) == ("cuda", "cpu"):
        load = partial(request.getfixturevalue("emulated"), check_order=False)
        monkeypatch.setattr(cuda_build, "load", lambda source, macros, _: load(source, macros))
        for op in FUNCTIONS:
            module = importlib.import_module(f"rwkv.ops.{op}_cuda")
            monkeypatch.setattr(module, "why_not", lambda sample, packed: None)


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-k", "interpreted")


def run_of(op: str, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    run = importlib.import_module(f"rwkv.ops.{op}_{backend}").run
    return partial(run, **{"cu_seqlens": None})


@emulated_or_interpreted
@pytest.mark.parametrize("iclr", [0.99, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_equal_keys(backend, device, iclr, spread):
    """The hardest inverse: every token removes what all tokens before it wrote, nothing decays."""
    x = wkv7_inputs(B=1, T=130, H=1, N=64, dtype=torch.float64)
    kk = F.normalize(x["a"][:, :1] + spread * x["a"], dim=-1)
    x |= {"w": torch.full_like(x["w"], -9.0), "a": -kk, "b": kk * iclr}
    x = {name: t.to(device, BFLOAT16) for name, t in x.items()}
    state = random_state(x)
    double = {name: t.double() for name, t in x.items()}
    want = with_gradients(run_of("wkv7", "reference"), double, state.double())
    got = with_gradients(run_of("wkv7", backend), x, state)
    for name, value in want.items():
        allowed = ALLOWED_EQUAL if name in ("d_a", "d_b") else ALLOWED
        assert_close(name, got[name], value, allowed)


@on_gpu
@pytest.mark.parametrize("op, decay", [(op, name) for op in DECAYS for name in DECAYS[op]])
def test_long_texts_keep_their_accuracy(backend, op, decay):
    """Against chunks in float64, which other tests hold to the reference."""
    x = INPUTS[op](B=1, T=65536, H=1, N=64, dtype=BFLOAT16, device="cuda")
    x["w"] = DECAYS[op][decay](x["w"].double()).to(BFLOAT16)
    state = random_state(x)
    double = {name: t.double() for name, t in x.items()}
    want = with_gradients(run_of(op, "torch"), double, state.double())
    assert_all_close(with_gradients(run_of(op, backend), x, state), want, ALLOWED)


def results(run, inputs, state, flows, cu_seqlens) -> list[Tensor]:
    """y, the last state, and the gradients of all inputs and of the state."""
    leaves = {name: x.detach().requires_grad_() for name, x in (inputs | {"state": state}).items()}
    outputs = run(**leaves, cu_seqlens=cu_seqlens)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), flows)
    return [*(x.detach() for x in outputs), *gradients]


def check_offsets(op: str, backend: str, device: str, lengths: Sequence[int] | int, H: int) -> None:
    """The last sequence of many gives the bits that it gives alone, forward and backward.

    One tensor serves for several inputs, which leaves room for gradients.

    Args:
        lengths: of packed texts; or the number of rows, of 4,096 tokens on a GPU.
    """
    N = 64
    rows = isinstance(lengths, int)
    B, T = (lengths, 4096 if device == "cuda" else 70) if rows else (1, sum(lengths))
    Q = B if rows else len(lengths)
    torch.manual_seed(0)
    x = torch.empty(B, T, H, N, dtype=BFLOAT16, device=device).uniform_(-1.5, -0.5)
    inputs = dict.fromkeys("rwkv", x)
    if op == "wkv7":
        a = torch.empty_like(x).uniform_(-0.12, 0.12)  # |a| < 1
        inputs |= {"a": a, "b": -a}
    else:
        inputs["u"] = x[0, 0]
    state = torch.randn(Q, H, N, N, device=device)
    ends = None if rows else torch.tensor([0, *lengths], device=device).cumsum(0)
    run = run_of(op, backend)
    every = results(run, inputs, state, (x, state), ends)

    def own(t: Tensor) -> Tensor:
        return t[-1:] if rows else t[:, T - lengths[-1] :]

    alone = {name: t if name == "u" else own(t) for name, t in inputs.items()}
    want = results(run, alone, state[-1:], (own(x), state[-1:]), None)
    names = ["y", "last state", *(f"d_{name}" for name in inputs), "d_state"]
    for name, whole, one in zip(names, every, want, strict=True):
        if name != "d_u":  # that of all sequences
            found = whole[-1:] if name.endswith("state") else own(whole)
            assert torch.equal(found, one), f"{name} differs"
            assert found.isfinite().all() and found.count_nonzero() > 0


@operators
@emulated_or_interpreted
@pytest.mark.parametrize("lengths", [[3, 70, 5], 3], ids=["packed", "rows"])
def test_the_last_sequence_is_as_it_is_alone(op, backend, device, lengths):
    check_offsets(op, backend, device, lengths, H=1)


@operators
@on_gpu
@pytest.mark.parametrize("lengths", [[7, 2**20 - 5, 300], 257], ids=["packed", "rows"])
def test_more_numbers_than_31_bits_count(op, backend, lengths):
    """The last sequence begins beyond 2^31 numbers: no index overflows, forward or backward."""
    torch.cuda.empty_cache()
    room, need = torch.cuda.mem_get_info()[0] / 2**30, 66
    if room < need:
        pytest.skip(f"needs {need} GiB of free GPU memory, here are {room:.0f}")
    try:
        check_offsets(op, backend, "cuda", lengths, H=32)
    finally:
        torch.cuda.empty_cache()


@operators
@emulated_or_interpreted
def test_torch_compiles_it_whole(op, backend, device):
    """Outputs and gradients have the bits of the operator itself, in one graph for all lengths."""
    torch.compiler.reset()  # what other cases compiled counts towards a limit
    itself = partial(FUNCTIONS[op], backend=backend)
    compiled = torch.compile(itself, fullgraph=True, backend="aot_eager")
    for T, ends in ((70, None), (80, None), (90, None), (70, (10, 70)), (90, (20, 30, 90))):
        x = INPUTS[op](B=1, T=T, H=2, N=64, dtype=BFLOAT16, device=device)
        borders = None if ends is None else torch.tensor([0, *ends], device=device)
        state = random_state(x, Q=1 if ends is None else len(ends))
        want, got = (
            with_gradients(run, x, state, cu_seqlens=borders) for run in (itself, compiled)
        )
        assert all(torch.equal(got[name], value) for name, value in want.items())


@operators
@on_gpu
def test_a_graph_replays_it(op, backend):
    """Forward and backward, on inputs that came after the graph was recorded."""
    first, second = (
        INPUTS[op](B=1, T=128, H=2, N=64, dtype=BFLOAT16, device="cuda", seed=seed)
        for seed in range(2)
    )
    state = random_state(first)
    flows = (torch.randn_like(first["v"]), torch.randn_like(state))
    static = {name: t.clone() for name, t in first.items()}
    record = partial(results, run_of(op, backend), static, state, flows, None)
    side = torch.cuda.Stream()  # autograd must not have seen the default one
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        record()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = record()
    for name, t in static.items():
        t.copy_(second[name])
    graph.replay()
    want = results(run_of(op, backend), second, state, flows, None)
    assert all(torch.equal(got, value) for got, value in zip(recorded, want, strict=True))
