"""The kernels of LoRA and Bone: those of the formulas, alone and within a layer and a model.

Without a GPU they run in Triton's interpreter, which must be chosen before triton is imported; so
this file then runs itself in a process of its own (`test_in_the_interpreter`).
"""

import os

import pytest
import torch
from helpers import assert_all_close, assert_close, pass_in_the_interpreter
from test_recompute import adapted_model
from torch import Tensor

from peft.bone import mix, unmix
from peft.registry import make_adapter
from peft.store_int8 import Int8Store
from peft.tuned_state import add_tuned_state
from rwkv.linear import Linear
from rwkv.ops.fused import uses_kernels

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}

kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in another process")
pytestmark = pytest.mark.gpu if ON_GPU else []
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="runs the others where there is no GPU")
@pytest.mark.parametrize(
    "part",
    [
        "recomputation and lora",
        "recomputation and bone",
        "trained_state",
        "not recomputation and not trained_state",
    ],
)
def test_in_the_interpreter(part):
    pass_in_the_interpreter(__file__, "-k", part)


def drawn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(DEVICE, dtype)


@kernels
@dtypes
@pytest.mark.parametrize("n", [1, 131, 300])
@pytest.mark.parametrize("rank", [16, 32, 64, 128])
def test_kernels_give_the_formulas(rank, n, dtype):
    """Rows that fill no tile, one block and several; the reference is float64."""
    C = 2 * rank
    x, e = drawn(n, C, dtype=dtype, seed=0), drawn(n, C, dtype=dtype, seed=1)
    G = drawn(2, rank, rank, dtype=dtype, seed=2, scale=rank**-0.5)
    shared = drawn(n, rank, dtype=dtype, seed=3)
    assert uses_kernels(x) and not uses_kernels(x.double())
    wide = [t.double() for t in (x, e, G, shared)]
    y, total = mix(x, G)
    want_y, want_total = mix(wide[0], wide[2])
    dx, dG = unmix(e, shared, x, G)
    want_dx, want_dG = unmix(wide[1], wide[3], wide[0], wide[2])
    assert y.dtype == total.dtype == dx.dtype == dtype
    for name, got, want in (
        ("y", y, want_y),
        ("total", total, want_total),
        ("dx", dx, want_dx),
        ("dG", dG, want_dG),
    ):
        assert got.shape == want.shape
        assert_close(name, got.double(), want, TOLERANCE[dtype])


def layer(mode: str, dtype: torch.dtype, rank: int = 16) -> Linear:
    torch.manual_seed(0)
    base = Linear(64, 32)
    torch.nn.init.normal_(base.weight, std=0.125)
    made = make_adapter(mode, base, rank=rank, scale=2.0)
    for part in made.PARTS:
        torch.nn.init.normal_(getattr(made, part), std=0.1)
    return made.to(DEVICE, torch.bfloat16).to(dtype)


@kernels
@dtypes
def test_bone_with_kernels_has_the_gradients_of_bone_without(dtype):
    results = []
    for kind in (dtype, torch.float64):
        some = layer("bone", kind)
        x = drawn(2, 9, 64, dtype=torch.bfloat16, seed=4).to(kind).requires_grad_()
        stream = drawn(2, 9, 32, dtype=torch.bfloat16, seed=5).to(kind).requires_grad_()
        out = some(x, stream)
        out.backward(drawn(2, 9, 32, dtype=torch.bfloat16, seed=6).to(kind))
        results.append((out, x.grad, stream.grad, some.bone.grad))
    for name, got, want in zip(("out", "x", "stream", "bone"), *results, strict=True):
        assert_close(name, got.detach().double(), want.detach(), TOLERANCE[dtype])


@kernels
@dtypes
@pytest.mark.parametrize("rank", [12, 16, 32])
@pytest.mark.parametrize("n", [3, 70])
def test_lora_adds_its_update_where_the_activation_is(rank, n, dtype, monkeypatch):
    """12 is a rank without kernels; the reference is float64 on the same numbers."""
    from rwkv.ops import low_rank_triton

    results, adds = [], []
    real = low_rank_triton.plus_product
    monkeypatch.setattr(
        low_rank_triton, "plus_product", lambda *a, **k: adds.append(k) or real(*a, **k)
    )
    for kind in (dtype, torch.float64):
        some = layer("lora", kind, rank)
        x = drawn(1, n, 64, dtype=torch.bfloat16, seed=4).to(kind).requires_grad_()
        out = some(x, activated=True)
        out.backward(drawn(1, n, 32, dtype=torch.bfloat16, seed=6).to(kind))
        results.append((out, x.grad, some.lora_A.grad, some.lora_B.grad))
    assert [one.get("activated", False) for one in adds] == ([True, False] if rank > 12 else [])
    for name, got, want in zip(("out", "x", "A", "B"), *results, strict=True):
        assert_close(name, got.detach().double(), want.detach(), TOLERANCE[dtype])


@kernels
@dtypes
@pytest.mark.parametrize("rank", [12, 16])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("store", ["dense", "int8", "adds apart"])
def test_lora_adds_in_either_order(rank, residual, store, dtype, monkeypatch):
    """The update first where the wide product adds at no cost, else last; the reference is float64.

    "adds apart" is a store such as fp8 on a GPU, whose products give new tensors.
    """
    monkeypatch.setattr(Int8Store, "adds_freely", lambda *_: store == "int8")
    results = []
    for kind in (dtype, torch.float64):
        some = layer("lora", kind, rank)
        if store != "dense":
            some.store_as(Int8Store("int8", some.dense_weight(torch.float32)))
        x = drawn(2, 35, 64, dtype=torch.bfloat16, seed=4).to(kind).requires_grad_()
        stream = drawn(2, 35, 32, dtype=torch.bfloat16, seed=5).to(kind).requires_grad_()
        out = some(x, stream if residual else None)
        out.backward(drawn(2, 35, 32, dtype=torch.bfloat16, seed=6).to(kind))
        found = (out, x.grad, stream.grad, some.lora_A.grad, some.lora_B.grad)
        results.append([x for x in found if x is not None])
    for number, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(str(number), got.detach().double(), want.detach(), TOLERANCE[dtype])


@kernels
@pytest.mark.parametrize(
    ("mode", "version", "dtype"),
    [(mode, version, torch.bfloat16) for mode in ("lora", "bone") for version in (6, 7)]
    + [("bone", 6, torch.float32), ("lora", 7, torch.float32)],
    ids=str,
)
def test_recomputation_with_kernels_gives_the_same_bits(mode, version, dtype):
    """bfloat16 has the operators keep what their backward pass wants.

    Theirs do not compile for heads of 16 channels, which a GPU's tests leave to plain torch.
    """
    gradients, backend = [], "torch" if ON_GPU else "triton"
    for grad_cp in (False, True, "selective"):
        model = adapted_model(version, mode, backend=backend).to(DEVICE, dtype)
        model.grad_cp = grad_cp
        hidden, _ = model(torch.arange(6, device=DEVICE).view(2, 3))
        hidden.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert all(torch.equal(again[name], gradient) for again in gradients[1:]), name


def from_a_trained_state(
    version: int, mode: str, backend: str, dtype, grad_cp
) -> dict[str, Tensor]:
    """Loss, hidden states and gradients of adapter, state and norms, over packed texts."""
    model = adapted_model(version, mode, backend=backend, rank=16)
    add_tuned_state(model)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("time_state"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        elif "ln" in name:
            parameter.requires_grad_(True)
    model.to(DEVICE, dtype).grad_cp = grad_cp
    borders = torch.tensor([0, 1, 6], device=DEVICE)
    hidden, states = model(torch.arange(6, device=DEVICE)[None], None, borders)
    loss = hidden.square().sum() + sum(layer.wkv.square().sum() for layer in states)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "hidden": hidden.detach()} | gradients


@kernels
@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("mode", ["lora", "bone"])
def test_packed_texts_from_a_trained_state_have_the_gradients_of_the_formulas(mode, version):
    """Through all kernels of a model, whatever it recomputes.

    The reference is plain torch in float64, for which there are no kernels.
    """
    want = from_a_trained_state(version, mode, "torch", torch.float64, False)
    backend = "torch" if ON_GPU else "triton"  # as above
    for grad_cp in (False, True, "selective"):
        got = from_a_trained_state(version, mode, backend, torch.float32, grad_cp)
        assert got.keys() == want.keys()
        assert_all_close(got, want, TOLERANCE[torch.float32])


@kernels
@pytest.mark.parametrize("mode", ["dora", "lora", "miss"])
def test_the_activation_is_that_of_the_output(mode):
    some = layer(mode, torch.float32)
    x = drawn(5, 64, dtype=torch.float32, seed=0)
    torch.testing.assert_close(some(x, activated=True), some(x).relu().square())


@kernels
def test_a_rank_without_kernels_is_computed_all_the_same():
    x, G = drawn(5, 48, dtype=torch.float32, seed=0), drawn(2, 24, 24, dtype=torch.float32, seed=1)
    y, total = mix(x, G)
    want_y, want_total = mix(x.double(), G.double())
    assert_close("y", y.double(), want_y, 1e-5)
    assert_close("total", total.double(), want_total, 1e-5)


@kernels
def test_no_rows_give_none():
    x, G = drawn(0, 32, dtype=torch.float32, seed=0), drawn(2, 16, 16, dtype=torch.float32, seed=1)
    assert mix(x, G)[0].shape == (0, 32)
