"""The fused kernels against the formulas in plain torch, in float64.

Without a GPU the kernels run in Triton's interpreter; that must be chosen before triton is
imported, so this file then runs itself in processes of its own (`test_in_the_interpreter`) and
skips everything else. On a GPU each size, dtype and choice of gradients is a kernel to compile, so
what the interpreter shows of the formulas is not shown again there: real sizes, one choice, bits.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_all_close, assert_close, pass_in_the_interpreter
from torch import Tensor, nn

from rwkv.config import LowRanks, RWKVConfig
from rwkv.init import initialize
from rwkv.model import RWKV
from rwkv.ops import fused
from rwkv.ops.activation import gated_sum, squared_relu
from rwkv.ops.head_output import head_output6, head_output7
from rwkv.ops.norm_mix import norm_shift_mix, norm_shift_mix_by_data
from rwkv.ops.packing import text_starts
from rwkv.ops.wkv7_inputs import wkv7_inputs

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32

# Largest relative error. Rounding to bfloat16 alone gives 1.7e-3; where torch's matrix products
# between two kernels round too, more is allowed.
ALLOWED = {FLOAT32: 1e-5, BFLOAT16: 5e-3}
WITH_PRODUCTS = {FLOAT32: 1e-5, BFLOAT16: 8e-3}

kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in another process")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, elsewhere")
pytestmark = pytest.mark.gpu if ON_GPU else []
dtypes = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)

Tensors = dict[str, Tensor]


PARTS = ("norm_mix", "wkv7_inputs", "head_output", "")  # by a word in the test's name; the rest


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="runs the others where there is no GPU")
@pytest.mark.parametrize("part", range(len(PARTS)), ids=[*PARTS[:-1], "rest"])
def test_in_the_interpreter(part):
    words = [f"not {word}" for word in PARTS[:part]] + [word for word in PARTS[part:][:1] if word]
    pass_in_the_interpreter(__file__, "-k", " and ".join(words))


def draw(seed: int, dtype: torch.dtype, **shapes: tuple[int, ...]) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)
        for name, shape in shapes.items()
    }


def layer_norm(weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    norm = nn.LayerNorm(weight.shape[0], device="meta")
    norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    return norm


def group_norm(weight: Tensor, bias: Tensor, H: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(H, weight.shape[0], eps=64e-5, device="meta")
    norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    return norm


# Each case calls one fusion with `x`, a dict of leaves, and returns all its results.


def norm_mix_case(x: Tensors, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    norm = layer_norm(x["weight"], x["bias"])
    norm.weight, norm.bias = _as_leaves(x["weight"], x["bias"])
    mixes = [value for name, value in x.items() if name.startswith("mix")]
    stream, mixed, last = norm_shift_mix(x["x"], norm, x["shift"], mixes, cu_seqlens)
    return [stream, *mixed, last]


def norm_mix_by_data_case(x: Tensors, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    norm = layer_norm(x["weight"], x["bias"])
    norm.weight, norm.bias = _as_leaves(x["weight"], x["bias"])
    mixes = [x[f"mix{i}"] for i in range(5)]
    stream, mixed, last = norm_shift_mix_by_data(
        x["x"], norm, x["shift"], x["mix"], x["low"], x["high"], mixes, cu_seqlens
    )
    return [stream, *mixed, last]


def _as_leaves(*tensors: Tensor) -> list[Any]:
    """A module's parameters are the leaves themselves, so that gradients land on them."""
    return [
        tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor) for tensor in tensors
    ]


def inputs_case(x: Tensors) -> list[Tensor]:
    given = dict.fromkeys(("v_first", "value", "v0")) | x
    return list(wkv7_inputs(**given))


def output7_case(x: Tensors) -> list[Tensor]:
    norm = group_norm(x["weight"], x["bias"], x["y"].shape[2])
    norm.weight, norm.bias = _as_leaves(x["weight"], x["bias"])
    return [head_output7(x["y"], norm, x["bonus"], x["v"], x["gate"])]


def output6_case(x: Tensors) -> list[Tensor]:
    norm = group_norm(x["weight"], x["bias"], x["y"].shape[2])
    norm.weight, norm.bias = _as_leaves(x["weight"], x["bias"])
    return [head_output6(x["y"], norm, x["gate"])]


def with_gradients(
    case: Callable[..., list[Tensor]],
    inputs: Tensors,
    frozen: tuple[str, ...] = (),
    unused: tuple[int, ...] = (),
    **options: Any,
) -> Tensors:
    """The results of a case, numbered, and the gradients `d_NAME` of what is not frozen.

    What flows back is random, the same for equal shapes and in every dtype, and nothing into the
    results `unused`.
    """
    leaves: Tensors = {
        name: nn.Parameter(x.detach().clone(), requires_grad=name not in frozen)
        for name, x in inputs.items()
    }
    results = case(leaves, **options)
    g = torch.Generator().manual_seed(7)
    flows = [torch.randn(x.shape, generator=g).bfloat16().to(x) for x in results]
    used = [n for n, x in enumerate(results) if n not in unused and x.requires_grad]
    torch.autograd.backward([results[n] for n in used], [flows[n] for n in used])
    values = {str(n): x.detach() for n, x in enumerate(results)}
    gradients = {n: x.grad for n, x in leaves.items() if x.requires_grad}
    return values | {
        f"d_{n}": torch.zeros_like(leaves[n]) if x is None else x for n, x in gradients.items()
    }


def check(
    case: Callable[..., list[Tensor]],
    inputs: Tensors,
    allowed: dict[torch.dtype, float] = ALLOWED,
    left_out: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """Results and gradients are those of the formulas in float64, but for those left out."""
    want = with_gradients(case, {name: x.double() for name, x in inputs.items()}, **options)
    got = with_gradients(case, inputs, **options)
    for name in left_out:
        del want[name], got[name]
    assert got.keys() == want.keys()
    dtype = next(iter(inputs.values())).dtype
    assert_all_close(got, want, allowed[dtype])


def norm_mix_inputs(
    *, B: int = 2, T: int = 5, C: int = 64, M: int = 6, Q: int | None = None, dtype=FLOAT32
) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"x": (B, T, C), "weight": (C,), "bias": (C,)}
    shapes["shift"] = (Q or B, C)
    return draw(0, dtype, **shapes, **{f"mix{i}": (1, 1, C) for i in range(M)})


def by_data_inputs(*, C: int, rank: int, dtype=FLOAT32) -> Tensors:
    """What RWKV-6's five mixes take beside norm_mix_inputs."""
    x = draw(1, dtype, mix=(1, 1, C), low=(C, 5 * rank), high=(5, rank, C))
    x["low"] *= C**-0.5
    return x


@interpreted
@dtypes
@pytest.mark.parametrize(
    "B, T, C, M", [(2, 4, 64, 6), (1, 1, 64, 1), (3, 1, 80, 2), (1, 9, 40, 6), (2, 9, 16, 1)]
)
def test_norm_mix_is_the_formula(B, T, C, M, dtype):
    check(norm_mix_case, norm_mix_inputs(B=B, T=T, C=C, M=M, dtype=dtype))


@interpreted
@dtypes
@pytest.mark.parametrize("B, T, C, rank", [(2, 5, 64, 3), (1, 1, 64, 1), (1, 9, 40, 4)])
def test_norm_mix_by_data_is_the_formula(B, T, C, rank, dtype):
    x = norm_mix_inputs(B=B, T=T, C=C, M=5, dtype=dtype)
    x |= by_data_inputs(C=C, rank=rank, dtype=dtype)
    check(norm_mix_by_data_case, x, WITH_PRODUCTS)


LENGTHS = ([5], [1], [1, 1, 1], [4, 1, 7, 2], [3, 9, 1])


@interpreted
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("by_data", [False, True], ids=["mixes", "by data"])
def test_norm_mix_of_packed_texts_is_the_formula(lengths, by_data):
    x = norm_mix_inputs(B=1, T=sum(lengths), Q=len(lengths), M=5)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    if by_data:
        x |= by_data_inputs(C=64, rank=2)
    check(norm_mix_by_data_case if by_data else norm_mix_case, x, cu_seqlens=ends)


@interpreted
@dtypes
def test_norm_mix_by_data_of_millions_of_tokens_can_be_launched(dtype, monkeypatch):
    """CUDA's grids have 65,535 programs at most on every axis but the first."""
    from rwkv.ops import mixes_by_data_triton as own
    from rwkv.ops.norm_mix_triton import Unmade

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **keys: None

    for kernel in ("_mixes_kernel", "_mixes_gradient_kernel"):
        monkeypatch.setattr(own, kernel, Recorder())
    T, C, M, R = 5_000_000, 128, 5, 8
    x, factor = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((1, T, C), (M, R, C)))
    normed, before = (torch.empty_like(x, requires_grad=True) for _ in range(2))
    unmade = Unmade(normed, before, x.new_empty(T, 2), None)
    low = x.new_empty(1, T, M * R)
    mixes = [x.new_empty(C)] * M
    norm = nn.LayerNorm(C, device="meta")
    mixed = own.mixes_by_data(x, norm, x.new_empty(1, C), low, factor, mixes, unmade)
    mixed[0].sum().backward()
    assert len(grids) == 2 and grids[0] == grids[1]
    assert all(size <= 65_535 for grid in grids for size in grid[1:])


@pytest.fixture
def uninitialized_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@interpreted
@pytest.mark.parametrize("by_data", [False, True], ids=["mixes", "by data"])
def test_norm_mix_of_empty_texts_behind_the_others(by_data, uninitialized_is_nan):
    """As graphs have them: nothing is read of what they are handed."""
    x = norm_mix_inputs(B=1, T=12, Q=6, M=5)
    case = norm_mix_case
    if by_data:
        x |= by_data_inputs(C=64, rank=2)
        case = norm_mix_by_data_case
    ends = torch.tensor([0, 4, 5, 12, 12, 12, 12])
    check(case, x, cu_seqlens=ends, unused=(6,), left_out=("6",))
    found = with_gradients(case, x, cu_seqlens=ends, unused=(6,))
    assert found["d_shift"][:3].any() and not found["d_shift"][3:].any()
    texts = {"shift": x["shift"][:3]}
    alone = with_gradients(case, x | texts, cu_seqlens=ends[:4], unused=(6,))
    assert torch.equal(found["6"][:3], alone["6"])


@interpreted
def test_empty_texts_behind_the_others_start_nowhere():
    ends, cpu = torch.tensor([0, 3, 5, 5, 5]), torch.device("cpu")
    assert text_starts(ends, 5, cpu).tolist() == [0, -1, -1, 1, -1, 2]
    assert text_starts(ends[:3], 5, cpu).tolist() == [0, -1, -1, 1, -1, 2]


@kernels
def test_norm_mix_of_packed_texts_is_that_of_separate_ones():
    """To the bit."""
    lengths = [4, 1, 7, 2]
    x = norm_mix_inputs(B=1, T=sum(lengths), Q=len(lengths), dtype=BFLOAT16)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    packed = norm_mix_case(x, cu_seqlens=ends)
    for q, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        text = {"x": x["x"][:, begin:end], "shift": x["shift"][q : q + 1]}
        alone = norm_mix_case(x | text)
        for got, want in zip(packed[:-1], alone[:-1], strict=True):
            assert torch.equal(got[:, begin:end], want)
        assert torch.equal(packed[-1][q : q + 1], alone[-1])


@kernels
@pytest.mark.parametrize("by_data", [False, True], ids=["mixes", "by data"])
def test_norm_mix_leaks_no_gradient_between_packed_texts(by_data):
    lengths = [4, 1, 7, 2]
    x = norm_mix_inputs(B=1, T=sum(lengths), Q=len(lengths), M=5)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    case = norm_mix_case
    if by_data:
        x |= by_data_inputs(C=64, rank=2)
        case = norm_mix_by_data_case
    leaves = x | {name: x[name].requires_grad_() for name in ("x", "shift")}
    results = case(leaves, cu_seqlens=ends)
    loss = sum(y[0, 5:12].sum() for y in results[:-1]) + results[-1][2].sum()
    loss.backward()
    assert not x["x"].grad[0, :5].any() and not x["x"].grad[0, 12:].any()
    assert x["x"].grad[0, 5:12].any()
    assert not x["shift"].grad[[0, 1, 3]].any() and x["shift"].grad[2].any()


@interpreted
@pytest.mark.parametrize("unused", [(0,), (7,), (0, 3, 7), (1, 2, 3, 4, 5, 6)], ids=str)
def test_norm_mix_of_which_part_is_used(unused):
    check(norm_mix_case, norm_mix_inputs(), unused=unused)


@kernels
@pytest.mark.parametrize(
    "frozen",
    [
        pytest.param(("x", "shift"), marks=interpreted),
        ("weight", "bias", "shift", *(f"mix{i}" for i in range(6))),
        pytest.param(("bias", "mix0", "mix4"), marks=interpreted),
        pytest.param(("weight", "mix1", "mix5", "x"), marks=interpreted),
    ],
    ids=["no input", "no parameter", "some", "others"],
)
def test_norm_mix_frozen_in_part(frozen):
    check(norm_mix_case, norm_mix_inputs(), frozen=frozen)


@interpreted
@pytest.mark.parametrize(
    "frozen",
    [
        ("x", "shift"),
        ("low", "high"),
        ("low", "mix2"),
        ("high", "weight", "bias", *(f"mix{i}" for i in range(5))),
        ("x", "weight", "bias", "shift", "mix", "low"),
    ],
    ids=["no input", "no product", "some", "one side alone", "the other side"],
)
def test_norm_mix_by_data_frozen_in_part(frozen):
    x = norm_mix_inputs(C=80, M=5)
    x |= by_data_inputs(C=80, rank=3)
    check(norm_mix_by_data_case, x, frozen=frozen)


@interpreted
@pytest.mark.parametrize("unused", [(0,), (1, 3), (6,), (0, 2, 4, 5, 6)], ids=str)
def test_norm_mix_by_data_of_which_part_is_used(unused):
    x = norm_mix_inputs(M=5)
    x |= by_data_inputs(C=64, rank=2)
    check(norm_mix_by_data_case, x, unused=unused)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    "C, dtype",
    [(768, BFLOAT16), (2304, BFLOAT16), (2560, BFLOAT16), (2560, FLOAT32), (4096, BFLOAT16)],
)
@pytest.mark.parametrize("by_data", [False, True], ids=["mixes", "by data"])
def test_wide_norm_mix_is_the_formula(by_data, C, dtype):
    """As many rows as make each program go along several, and rows begin in its midst."""
    x = norm_mix_inputs(B=3, T=1001, C=C, M=5 if by_data else 6, dtype=dtype)
    if by_data:
        x |= by_data_inputs(C=C, rank=32, dtype=dtype)
        x["high"] *= 0.1
    allowed = WITH_PRODUCTS if by_data else ALLOWED
    check(norm_mix_by_data_case if by_data else norm_mix_case, x, allowed)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    "H, N, dtype", [(12, 64, BFLOAT16), (40, 64, FLOAT32), (16, 128, BFLOAT16)]
)
def test_many_heads_are_the_formula(H, N, dtype):
    check(inputs_case, wkv7_projections(B=3, T=1001, H=H, N=N, dtype=dtype))
    check(output7_case, output_inputs(7, 3, 1001, H, N, dtype))
    check(output6_case, output_inputs(6, 3, 1001, H, N, dtype))


def wkv7_projections(
    *, B=2, T=3, H=2, N=16, first: bool = False, dtype: torch.dtype = FLOAT32
) -> Tensors:
    C = H * N
    names = ["r", "k", "v", "decay", "iclr"] + ([] if first else ["v_first", "value"])
    parameters = ["w0", "a0", "k_k", "k_a"] + ([] if first else ["v0"])
    return draw(
        2,
        dtype,
        **dict.fromkeys(names, (B, T, C)),
        **dict.fromkeys(parameters, (1, 1, C)),
        r_k=(H, N),
    )


@interpreted
@dtypes
@pytest.mark.parametrize("first", [False, True], ids=["layer 1", "layer 0"])
@pytest.mark.parametrize(
    "B, T, H, N", [(2, 3, 2, 16), (1, 1, 1, 64), (1, 9, 5, 64), (1, 3, 3, 128)]
)
def test_wkv7_inputs_are_the_formula(B, T, H, N, first, dtype):
    check(inputs_case, wkv7_projections(B=B, T=T, H=H, N=N, first=first, dtype=dtype))


@kernels
@pytest.mark.parametrize(
    "frozen",
    [
        ("w0", "a0", "v0", "k_k", "k_a", "r_k"),
        pytest.param(("r", "k", "v", "v_first", "decay", "iclr", "value"), marks=interpreted),
        pytest.param(("r", "decay", "v", "a0", "k_k"), marks=interpreted),
        pytest.param(
            ("k", "v_first", "value", "iclr", "w0", "v0", "r_k", "k_a"), marks=interpreted
        ),
    ],
    ids=["no parameter", "no input", "some", "others"],
)
def test_wkv7_inputs_frozen_in_part(frozen):
    check(inputs_case, wkv7_projections(), frozen=frozen)


@interpreted
@pytest.mark.parametrize("unused", [(0, 8), (1, 3, 6), (2, 4, 5, 7), (6, 7)], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["layer 1", "layer 0"])
def test_wkv7_inputs_of_which_part_is_used(unused, first):
    check(inputs_case, wkv7_projections(first=first), unused=unused)


@kernels
def test_wkv7_inputs_at_their_limits():
    """A head of zeros, as padding may have; decays and gates far from zero."""
    x = wkv7_projections()
    x["k"][0, 1, :16] = 0
    x["decay"] *= 40
    x["iclr"] *= 40
    x["value"] *= 40
    got = with_gradients(inputs_case, x)
    want = with_gradients(inputs_case, {name: t.double() for name, t in x.items()})
    for name, value in want.items():
        if name in ("d_k", "d_k_k"):  # divided by 1e-12 where the head is zero
            assert got[name].isfinite().all()
            got[name][..., :16] = value[..., :16] = 0
        assert_close(name, got[name], value, ALLOWED[FLOAT32])
    assert (got["1"] <= -0.5).all()


def output_inputs(version: int, B: int, T: int, H: int, N: int, dtype: torch.dtype) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"y": (B, T, H, N), "gate": (B, T, H * N)}
    shapes |= {"weight": (H * N,), "bias": (H * N,)}
    if version == 7:
        shapes |= {"v": (B, T, H, N), "bonus": (B, T, H)}
    return draw(3, dtype, **shapes)


@interpreted
@dtypes
@pytest.mark.parametrize(
    "B, T, H, N", [(2, 3, 2, 16), (1, 1, 1, 64), (1, 9, 5, 64), (1, 3, 3, 128)]
)
@pytest.mark.parametrize("version", [6, 7], ids=["v6", "v7"])
def test_head_output_is_the_formula(version, B, T, H, N, dtype):
    x = output_inputs(version, B, T, H, N, dtype)
    check(output7_case if version == 7 else output6_case, x)


@kernels
@pytest.mark.parametrize(
    "frozen",
    [
        ("weight", "bias"),
        pytest.param(("y", "v"), marks=interpreted),
        pytest.param(("gate", "bonus", "bias"), marks=interpreted),
    ],
    ids=str,
)
def test_head_output_frozen_in_part(frozen):
    check(output7_case, output_inputs(7, 2, 3, 2, 16, FLOAT32), frozen=frozen)


@kernels
@dtypes
@pytest.mark.parametrize("size", [1, 5000, 8192])
def test_activations_are_the_formulas(size, dtype):
    x = draw(4, dtype, x=(size,), gate=(size,), value=(size,))
    check(lambda x: [squared_relu(x["x"])], {"x": x["x"]})
    check(lambda x: [gated_sum(x["x"], x["gate"], x["value"])], x)


@kernels
def test_a_nan_is_not_hidden():
    x = torch.tensor([float("nan"), -1.0, float("inf"), 2.0], device=DEVICE)
    torch.testing.assert_close(squared_relu(x), torch.relu(x).square(), equal_nan=True)


CASES: dict[str, tuple[Callable[..., list[Tensor]], Callable[[], Tensors]]] = {
    "norm_mix": (norm_mix_case, lambda: norm_mix_inputs(T=5, dtype=BFLOAT16)),
    "wkv7_inputs": (inputs_case, lambda: wkv7_projections(T=5, dtype=BFLOAT16)),
    "head_output7": (output7_case, lambda: output_inputs(7, 2, 5, 2, 16, BFLOAT16)),
    "head_output6": (output6_case, lambda: output_inputs(6, 2, 5, 2, 16, BFLOAT16)),
}


@kernels
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_in_bfloat16_is_no_further_from_float64_than_torch(name, monkeypatch):
    """Up to what rounding the results themselves costs."""
    case, inputs = CASES[name]
    want = with_gradients(case, {name: x.double() for name, x in inputs().items()})
    got = with_gradients(case, inputs())
    monkeypatch.setattr(fused, "uses_kernels", lambda *_: False)
    plain = with_gradients(case, inputs())
    for key, value in want.items():
        ours, theirs = (
            ((x[key].double() - value).norm() / value.norm()).item() for x in (got, plain)
        )
        assert ours <= max(theirs, 2.5e-3), f"{key}: {ours:.1e}, torch {theirs:.1e}"


@kernels
@pytest.mark.parametrize("name", CASES)
def test_two_runs_give_the_same_bits(name):
    case, inputs = CASES[name]
    first, second = with_gradients(case, inputs()), with_gradients(case, inputs())
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@kernels
@pytest.mark.parametrize("name", CASES)
def test_without_gradients_a_kernel_gives_the_same(name):
    case, inputs = CASES[name]
    want = case({name: x.requires_grad_() for name, x in inputs().items()})
    with torch.no_grad():
        got = case(inputs())
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@kernels
@pytest.mark.parametrize("version", [6, 7], ids=["v6", "v7"])
@pytest.mark.parametrize(
    "packed, again", [(False, False), (True, True)], ids=["rows", "packed, recomputed"]
)
def test_a_model_of_kernels_is_the_model_of_formulas(version, packed, again, monkeypatch):
    """Hidden states, states and all gradients, from a state that has gradients too."""
    torch.manual_seed(0)
    config = RWKVConfig(
        version=version,
        n_layer=2,
        n_embd=64,
        dim_ffn=96,
        vocab_size=20,
        head_size=16,
        ranks=LowRanks(decay=4, iclr=3, value=2, gate=5, mix=3),
    )
    model = RWKV(config, backend="torch")
    initialize(model)
    for parameter in model.parameters():  # the first values leave much at zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(DEVICE).grad_cp = again
    tokens = torch.randint(20, (1, 6) if packed else (2, 3), device=DEVICE)
    borders = torch.tensor([0, 3, 4, 6], device=DEVICE) if packed else None
    found = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(fused, "uses_kernels", lambda *_: False)
        _, state = model(tokens, cu_seqlens=borders)
        hidden, end = model(tokens, state, borders)
        loss = hidden.square().sum() + sum(x.square().sum() for layer in end for x in layer)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        values = {"hidden": hidden.detach()}
        values |= {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
        found.append(values)
    assert found[0].keys() == found[1].keys()
    assert_all_close(found[0], found[1], 1e-5)


@kernels
def test_what_is_left_to_the_formulas():
    """Other dtypes, and parameters that ZeRO-3 keeps elsewhere."""
    x, parameter = torch.ones(2, 3, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    assert fused.uses_kernels(x, parameter)
    assert not fused.uses_kernels(x.double(), parameter)
    assert not fused.uses_kernels(x.half(), parameter)
    assert not fused.uses_kernels(x[:, :0], parameter)
    assert not fused.uses_kernels(x, parameter, parameter[:0])


@interpreted
def test_sizes_that_no_kernel_handles_are_computed_all_the_same():
    check(norm_mix_case, norm_mix_inputs(B=1, T=2, C=9216, M=1))
    check(inputs_case, wkv7_projections(B=1, T=2, H=3, N=8))
    check(output7_case, output_inputs(7, 1, 2, 3, 8, FLOAT32))


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="a CPU runs the kernels here")
def test_a_cpu_runs_the_formulas():
    assert not fused.uses_kernels(torch.ones(64))
