"""Every adapter over every storage: what a fresh one does, its gradients, its merged weight."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from peft import pissa
from peft.adapter import AdapterLinear, adapters_off, only_adapters_train
from peft.layer_profile import ADAPTER_MODES
from peft.lora import LoraLinear
from peft.registry import ADAPTERS, make_adapter
from peft.stores import STORES, make_store
from rwkv import linear
from rwkv.checkpoint import read_tensors, write_tensors
from rwkv.errors import InputError
from rwkv.linear import Linear

OUT, IN, RANK = 64, 128, 16
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


class Place(NamedTuple):
    """Where a case runs, in which dtype."""

    device: str = "cpu"
    dtype: torch.dtype = FLOAT32


CPU, NARROW, GPU = Place(), Place(dtype=BFLOAT16), Place("cuda", BFLOAT16)


def base(storage: str = "none", place: Place = CPU) -> Linear:
    torch.manual_seed(0)
    layer = Linear(IN, OUT).to(place.dtype)
    torch.nn.init.normal_(layer.weight, std=IN**-0.5)
    layer.to(place.device).requires_grad_(False)
    if storage != "none":
        layer.store_as(make_store(storage, layer.weight))
    return layer


def adapter(mode: str, storage: str = "none", place: Place = CPU) -> AdapterLinear:
    """As `peft.apply.install` makes it: PiSSA stores what is left beside its first directions."""
    torch.manual_seed(1)
    late = mode == "pissa" and storage != "none"
    made = make_adapter(mode, base("none" if late else storage, place), rank=RANK, scale=2.0)
    if late:
        made.store_as(make_store(storage, made.weight))
    return made


def stirred(mode: str, storage: str = "none", place: Place = CPU) -> AdapterLinear:
    """An adapter that does something."""
    made = adapter(mode, storage, place)
    with torch.no_grad():
        for part in made.PARTS:
            value = getattr(made, part)
            value.add_(torch.randn(value.shape).to(value), alpha=0.05)
    return made


def drawn(channels: int, place: Place = CPU, seed: int = 2) -> torch.Tensor:
    """33 tokens, [3, 11, channels]: as many as int8's products of whole numbers are worth."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(3, 11, channels, generator=draw).to(*place)


def rows(place: Place = CPU) -> torch.Tensor:
    return drawn(IN, place)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def tolerance(storage: str, place: Place) -> float:
    """Relative error of an output or a gradient, one product with its rounding.

    A GPU that multiplies in 8 bits rounds activations and gradients to them.
    """
    if place == GPU:
        return {"fp8": 4e-2, "int8": 1.5e-2}.get(storage, 8e-3)
    return 1e-5 if place.dtype == FLOAT32 else 8e-3


def cases() -> Iterator[Any]:
    """Every storage on a CPU in both dtypes; on a GPU one of those whose kernels are the same."""
    for storage in ("none", *STORES):
        yield pytest.param(storage, CPU, id=f"{storage}-float32")
        yield pytest.param(storage, NARROW, id=f"{storage}-bfloat16")
    for storage in ("none", "nf4", "int8", "fp8", "fp6"):
        yield pytest.param(storage, GPU, id=f"{storage}-gpu", marks=pytest.mark.gpu)


grid = pytest.mark.parametrize("storage, place", list(cases()))
modes = pytest.mark.parametrize("mode", ADAPTER_MODES)


def test_every_mode_has_an_adapter():
    assert set(ADAPTER_MODES) == set(ADAPTERS)


@grid
@modes
def test_fresh_adapter_changes_nothing(mode, storage, place):
    """PiSSA over codes is nearer to W than the codes of W, so it is held to W itself.

    Over bfloat16 its rest is rounded once more than W. A GPU sums a product that adds to zeros in
    an order of its own.
    """
    made, x = adapter(mode, storage, place), rows(place)
    if mode == "pissa" and storage != "none":
        dense = F.linear(x, base(place=place).weight)
        assert relative(made(x), dense) <= relative(base(storage, place)(x), dense) * 1.05
    else:
        exact = 1e-5 if place.device == "cpu" and mode != "pissa" else 8e-3
        allowed = min(exact, tolerance(storage, place))
        assert relative(made(x), base(storage, place)(x)) < allowed


@pytest.mark.parametrize("storage", ["none", "int8", "fp6"])
@modes
def test_rows_of_zeros_give_zeros_and_finite_gradients(mode, storage):
    """As attention's output is in a new model, whose rows have no direction."""
    torch.manual_seed(0)
    layer = Linear(IN, OUT)
    torch.nn.init.normal_(layer.weight)
    layer.weight.data[::2] = 0
    layer.requires_grad_(False)
    if storage != "none":
        layer.store_as(make_store(storage, layer.weight))
    if mode == "pissa" and storage != "none":
        pytest.skip("it takes directions out before a weight is stored")
    made = make_adapter(mode, layer, rank=RANK, scale=2.0)
    y = made(rows())
    assert y[..., ::2].abs().max() < 1e-5 < y[..., 1::2].abs().max()
    y.square().sum().backward()
    for part in made.PARTS:
        assert getattr(made, part).grad.isfinite().all(), part
    assert made.merged_weight().isfinite().all()


@grid
@modes
def test_merged_weight_gives_the_same_output(mode, storage, place):
    made, x = stirred(mode, storage, place), rows(place)
    want = F.linear(x.float(), made.merged_weight())
    assert relative(made(x), want) < tolerance(storage, place)


@grid
@modes
def test_gradients_are_those_over_the_dequantized_weight(mode, storage, place):
    """The twin computes in float32."""
    made = stirred(mode, storage, place)
    twin = deepcopy(made).float()
    twin.store = None
    twin.weight = torch.nn.Parameter(made.dense_weight(), requires_grad=False)
    results = []
    for layer, dtype in ((made, place.dtype), (twin, FLOAT32)):
        leaf = rows(place).to(dtype).requires_grad_()
        layer(leaf).backward(drawn(OUT, place, seed=3).to(dtype))
        results.append([leaf.grad, *(getattr(layer, part).grad for part in layer.PARTS)])
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < tolerance(storage, place)


@grid
@modes
def test_only_the_adapter_trains(mode, storage, place):
    made = adapter(mode, storage, place)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == set(made.PARTS)
    assert set(made.state_dict()) == trained | ({"weight"} if storage == "none" else set())
    assert only_adapters_train(made)


@grid
@modes
def test_training_goes_on_from_a_file(mode, storage, place, tmp_path):
    """As if it had not been saved, bit for bit on a CPU."""
    made = stirred(mode, storage, place)
    write_tensors(tmp_path / "adapter.pth", made.exported())
    again = adapter(mode, storage, place)
    again.load(dict(read_tensors(tmp_path / "adapter.pth")))
    before = made(rows(place))
    for layer in (made, again):
        steps = torch.optim.SGD([getattr(layer, part) for part in layer.PARTS], lr=0.1)
        for seed in (3, 4):
            steps.zero_grad()
            layer(rows(place)).backward(drawn(OUT, place, seed) / 64)
            steps.step()
    assert relative(before, made(rows(place))) > 1e-2
    for part in made.PARTS:
        got, want = getattr(again, part), getattr(made, part)
        assert relative(got, want) < tolerance(storage, place) if place == GPU else got.equal(want)


@modes
def test_a_cast_of_the_model_is_survived(mode):
    """Lightning's bf16-true casts every float; int8 scales and DoRA's row lengths stay float32."""
    made = torch.nn.Sequential(adapter(mode, "int8")).to(BFLOAT16)[0]
    assert torch.equal(made.dense_weight(), adapter(mode, "int8").dense_weight())
    assert relative(made(rows(NARROW)), base()(rows())) < 2e-2


@modes
def test_adapters_off_is_the_base_model(mode):
    made, x = torch.nn.Sequential(stirred(mode)), rows()
    with adapters_off(made):
        assert relative(made(x), base()(x)) < 1e-5
    assert relative(made(x), base()(x)) > 1e-2


def test_only_adapters_train_sees_a_whole_layer():
    model = torch.nn.Sequential(adapter("lora"), torch.nn.LayerNorm(OUT))
    assert not only_adapters_train(model)


# W, G and D of rank 2 over a [4, 6] weight, and what they make of it: numbers from numpy in
# float64, the update written out block by block: W (-11.5 .. 11.5) / 10, G (-5 .. 6) / 20,
# D (-3.5 .. 3.5) / 10.
WEIGHT = (torch.arange(24.0).reshape(4, 6) - 11.5) / 10
BONE = (torch.arange(12.0).reshape(3, 2, 2) - 5) / 20
BONE_UPDATE = [
    [0.195, 0.135, -0.045, -0.085, -0.125, -0.145],
    [0.055, 0.055, 0.055, 0.075, 0.215, 0.255],
    [-0.285, -0.225, -0.045, 0.035, 0.355, 0.455],
    [-0.425, -0.305, 0.055, 0.195, 0.695, 0.855],
]
MISS = (torch.arange(8.0).reshape(2, 4) - 3.5) / 10
MISS_UPDATE = [[a, b] * 3 for a, b in ((-0.35, 0.05), (-0.25, 0.15), (-0.15, 0.25), (-0.05, 0.35))]
LORA_A = torch.full((1, 6), 0.1)
LORA_B = torch.tensor([[0.1], [0.2], [-0.1], [0.0]])
DORA_ROWS = [
    [-1.15476, -1.052569, -0.950377, -0.848186, -0.745995, -0.643804],
    [-0.565959, -0.454986, -0.344014, -0.233042, -0.12207, -0.011097],
    [0.031576, 0.13683, 0.242084, 0.347338, 0.452592, 0.557846],
    [0.65, 0.75, 0.85, 0.95, 1.05, 1.15],
]
DORA_COLUMNS = [
    [-1.155534, -1.052981, -0.949504, -0.845462, -0.741384, -0.637762],
    [-0.521524, -0.419148, -0.316501, -0.213912, -0.111715, -0.010123],
    [0.030678, 0.132901, 0.234824, 0.336147, 0.436706, 0.53653],
    [0.664688, 0.766734, 0.867827, 0.967697, 1.066374, 1.164169],
]


@pytest.mark.parametrize(
    "mode, parts, rank, want",
    [
        ("bone", {"bone": BONE}, 2, WEIGHT + torch.tensor(BONE_UPDATE)),
        ("miss", {"miss": MISS}, 2, WEIGHT + torch.tensor(MISS_UPDATE)),
        ("lora", {"lora_A": LORA_A, "lora_B": LORA_B}, 1, WEIGHT + 0.2 * LORA_B),
        ("dora", {"lora_A": LORA_A, "lora_B": LORA_B}, 1, torch.tensor(DORA_ROWS)),
        ("dora_column", {"lora_A": LORA_A, "lora_B": LORA_B}, 1, torch.tensor(DORA_COLUMNS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_merged_weight_by_hand(mode, parts, rank, want):
    """LoRA: 2 B A is 0.2 B in every column; DoRA: W + 2 B A at the lengths of W."""
    layer = Linear(6, 4)
    layer.weight = torch.nn.Parameter(WEIGHT.clone())
    made = make_adapter(mode, layer, rank=rank, scale=2.0)
    with torch.no_grad():
        for part, value in parts.items():
            getattr(made, part).copy_(value)
    torch.testing.assert_close(made.merged_weight(), want, rtol=0, atol=2e-6)
    x = torch.randn(7, 6)
    torch.testing.assert_close(made(x), x @ want.T, rtol=1e-4, atol=1e-5)


def test_bone_of_rank_1_by_hand():
    """W' = W (1 + g_j) + g_j in column j."""
    layer = base()
    made = make_adapter("bone", layer, rank=1)
    torch.nn.init.normal_(made.bone)
    g = made.bone.view(1, -1)
    torch.testing.assert_close(made.merged_weight(), layer.weight * (1 + g) + g)


def test_miss_with_a_last_slice_that_is_not_whole():
    """in = 5, rank 2: the slices are x_0 x_1, x_2 x_3, x_4, the last with D's first row alone."""
    layer = Linear(5, 3)
    torch.nn.init.normal_(layer.weight)
    made = make_adapter("miss", layer, rank=2)
    torch.nn.init.normal_(made.miss)
    d = made.miss.T  # [out, rank]
    want = layer.weight + torch.cat([d, d, d[:, :1]], dim=1)
    torch.testing.assert_close(made.merged_weight(), want)
    x = torch.randn(4, 5)
    torch.testing.assert_close(made(x), x @ want.T)


def test_pissa_is_exported_as_lora_of_twice_the_rank():
    made = stirred("pissa")
    plain = LoraLinear(base(), rank=2 * RANK, scale=2.0)
    plain.load({part: value.detach() for part, value in made.exported().items()})
    torch.testing.assert_close(plain.merged_weight(), made.merged_weight(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_pissa_takes_over_a_files_first_directions(dtype):
    """Also those near its own, as of a run in another dtype: the weight is the file's to rounding.

    A file's own directions leave the rest as it is, to the bit.
    """
    place = Place(dtype=dtype)
    other, again = stirred("pissa", place=place), adapter("pissa", place=place)
    parts = {part: value.detach().clone() for part, value in other.exported().items()}
    rest = again.weight.clone()
    again.load(parts)
    assert torch.equal(again.weight, rest)
    parts["lora_A"][RANK:] *= 1 + 2**-8  # which bfloat16 has
    again.load(parts)
    assert all(torch.equal(value, parts[part]) for part, value in again.exported().items())
    update = other.scale * parts["lora_B"].double() @ parts["lora_A"].double()
    want = base(place=place).weight + update
    assert relative(again.merged_weight(), want) < (1e-6 if dtype == FLOAT32 else 2e-3)


@pytest.mark.parametrize("storage", ["none", "int8"])
@pytest.mark.parametrize("off, refused", [(1.005, False), (1.02, True)], ids=["near", "far"])
def test_pissas_codes_lie_beside_directions_within_a_hundredth(storage, off, refused):
    """Norms of what would have to move, over that of the first directions; moving is free."""
    made = adapter("pissa", storage)
    parts = {part: value.detach().clone() for part, value in made.exported().items()}
    parts["lora_A"][RANK:] *= off
    assert (made.why_not(parts) is not None) == (refused and storage != "none")


@pytest.mark.parametrize("storage", ["none", "int8", "nf4"])
@pytest.mark.parametrize("mode", ["dora", "dora_column", "pissa"])
def test_an_adapter_that_reads_its_weight_in_slices_is_that_of_the_whole(
    mode, storage, monkeypatch
):
    """Of two rows at a time; PiSSA's codes may differ where a weight lies between two of them."""
    whole, asked = adapter(mode, storage), []
    monkeypatch.setattr(linear, "SLICE", 2 * IN)
    if mode != "pissa":  # whose weight is in parts without being dense
        dense = Linear.dense_weight
        monkeypatch.setattr(Linear, "dense_weight", lambda *args: asked.append(1) or dense(*args))
    parts = adapter(mode, storage)
    assert not asked
    allowed = 1e-6 if mode != "pissa" or storage == "none" else 1e-3
    assert relative(parts.merged_weight(), whole.merged_weight()) < allowed
    if mode != "pissa":
        torch.testing.assert_close(parts.lora_M, whole.lora_M, rtol=1e-6, atol=0)
        torch.testing.assert_close(parts.squared, whole.squared, rtol=1e-6, atol=0)


def test_pissa_goes_on_over_a_weight_of_zeros():
    """As new models have: both norms are 0."""
    layer = Linear(IN, OUT)
    torch.nn.init.zeros_(layer.weight)
    made = make_adapter("pissa", layer, rank=RANK)
    made.store_as(make_store("int8", made.weight))
    assert made.why_not(made.exported()) is None


def test_pissa_takes_the_largest_directions():
    """The rest beside rank directions is as large as the singular values behind them."""
    made = make_adapter("pissa", base(), rank=RANK, scale=2.0, power=0)
    singular = torch.linalg.svdvals(base().weight)
    assert made.weight.norm().item() == pytest.approx(singular[RANK:].norm().item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(96, 256), (256, 96), (128, 128)], ids=str)
@pytest.mark.parametrize("power", [1, 4])
def test_pissas_directions_are_those_of_torch_svd_lowrank(shape, power):
    """Also those of files that a CPU made with it; the start matters, not the global generator."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    U, S, V = torch.svd_lowrank(weight, q=RANK, niter=power)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    A, B = pissa._principal(weight, RANK, power)
    assert torch.equal(torch.get_rng_state(), before)
    assert relative(B @ A, U * S @ V.T) < 1e-5
    torch.testing.assert_close(torch.linalg.svdvals(B @ A)[:RANK], S, rtol=1e-5, atol=0)


def test_pissa_seeds_no_global_generator(monkeypatch):
    """A device's own would start elsewhere, and those of other devices would be left seeded."""
    seeded = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    make_adapter("pissa", Linear(IN, OUT), rank=4)
    assert not seeded


@pytest.mark.gpu
@pytest.mark.parametrize("power", [0, 4])
def test_pissas_directions_are_the_same_on_a_gpu(power):
    """Of weights whose singular values lie densely, where other starts lead elsewhere."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    (A, B), (far_A, far_B) = (
        pissa._principal(weight.to(device), RANK, power) for device in ("cpu", "cuda")
    )
    assert relative((far_B @ far_A).cpu(), B @ A) < 1e-3


def test_dropout_acts_on_the_update_alone():
    layer = base()
    made = LoraLinear(layer, rank=4, scale=1.0, dropout=0.5)
    torch.nn.init.ones_(made.lora_B)
    x = rows()
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    torch.nn.init.zeros_(made.train().lora_B)
    assert torch.equal(made(x), layer(x))


@pytest.mark.parametrize(
    "mode, rank, message",
    [
        ("bone", 24, r"bone: rank 24 does not divide both sides of a \[64, 128\] weight; .* as 16"),
        ("lora", 65, r"lora: rank 65 is outside 1 to 64, the smaller side of a \[64, 128\] weight"),
        ("miss", 0, "miss: rank 0 is outside 1 to 64"),
    ],
)
def test_a_rank_that_does_not_fit_is_named(mode, rank, message):
    with pytest.raises(InputError, match=message):
        make_adapter(mode, base(), rank=rank)


def test_bone_costs_no_dense_update():
    """The adapted product never builds an [out, in] update: nothing that large is kept."""
    made, sizes = stirred("bone"), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        made(rows())
    base_sizes = {OUT * IN}  # the frozen weight itself
    assert {n for n in sizes if n >= OUT * IN} <= base_sizes and sizes.count(OUT * IN) <= 1
