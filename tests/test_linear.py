"""Linear layers and adapters: values and gradients of the formula, and what they keep for it."""

import pytest
import torch
from helpers import assert_close
from test_adapters import IN, OUT, RANK, base, stirred
from torch import Tensor
from torch.nn import functional as F

from rwkv.keeper import Keeper, Kept, second_run
from rwkv.linear import Linear

LAYERS = ["frozen", "trained", "lora", "bone", "miss", "dora", "dora_column", "pissa"]
kinds = pytest.mark.parametrize("kind", LAYERS)


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(2)).to(dtype)


def layer_of(kind: str, storage: str = "none") -> Linear:
    if kind in ("frozen", "trained"):
        layer = base(storage)
        layer.requires_grad_(kind == "trained")
    else:
        layer = stirred(kind, storage)
    return layer


def with_gradients(layer: Linear, run, *, residual: bool) -> dict[str, Tensor]:
    """Output and gradients of x, of the residual and of all that trains."""
    x = rows(next(layer.parameters()).dtype).requires_grad_()
    stream = torch.linspace(-1, 1, 15 * OUT, dtype=x.dtype).view(3, 5, OUT).requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    out = run(x, stream if residual else None)
    out.backward(torch.linspace(1, 2, out.numel(), dtype=x.dtype).view(out.shape).sin())
    return {"out": out.detach(), "x": x.grad, "stream": stream.grad} | {
        name: p.grad for name, p in trained.items()
    }


@kinds
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_output_and_gradients_are_those_of_the_formula(kind, residual):
    """The merged weight is written as a formula in the trained parameters, so autograd knows it.

    DoRA holds its norms constant in the gradient, which the merged weight does not.
    """
    layer, twin = layer_of(kind).double(), layer_of(kind).double()

    def formula(x: Tensor, stream: Tensor | None) -> Tensor:
        out = F.linear(x, twin.merged_weight(torch.float64))
        return out if stream is None else stream + out

    got = with_gradients(layer, layer, residual=residual)
    want = with_gradients(twin, formula, residual=residual)
    assert got.keys() == want.keys()
    if kind.startswith("dora"):  # its lengths are float32
        for name in ("out", "stream") if residual else ("out",):
            assert_close(name, got[name], want[name], 1e-6)
        return
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", ["frozen", "lora", "bone"])
@pytest.mark.parametrize("storage", ["none", "int8"])
def test_only_what_the_gradient_reads_is_kept(kind, storage):
    """A frozen weight: nothing. LoRA: x and x A^T. Bone: x. Neither ever the output."""
    layer, kept = layer_of(kind, storage), []
    x = rows().requires_grad_()
    own = {p.data_ptr() for p in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x, torch.zeros(3, 5, OUT))
    sizes = sorted(t.numel() for t in kept if t.data_ptr() not in own)
    assert sizes == {"frozen": [], "lora": [15 * RANK, 15 * IN], "bone": [15 * IN]}[kind]


@pytest.mark.parametrize("kind", ["lora", "bone"])
def test_adapters_of_another_dtype_than_the_stream(kind):
    """float32 adapters over a bfloat16 model: gradients in float32, near those of float32."""
    layer, exact = layer_of(kind), layer_of(kind)
    layer.weight.data = layer.weight.data.bfloat16()
    results = []
    for some, dtype in ((layer, torch.bfloat16), (exact, torch.float32)):
        x = rows(dtype).requires_grad_()
        out = some(x, torch.ones(3, 5, OUT, dtype=dtype))
        assert out.dtype == dtype
        out.float().square().sum().backward()
        parts = [getattr(some, part).grad for part in some.PARTS]
        assert x.grad.dtype == dtype and all(g.dtype == torch.float32 for g in parts)
        results.append([out, x.grad, *parts])
    for got, want in zip(*results, strict=True):
        assert ((got.float() - want).norm() / want.norm()).item() < 2e-2


@kinds
def test_a_layer_without_rows_gives_none(kind):
    layer = layer_of(kind)
    assert layer(torch.zeros(0, IN)).shape == (0, OUT)


@kinds
def test_a_result_left_out_has_the_same_gradient(kind):
    """Only layers that close their part, and only within the block."""
    layer = layer_of(kind).double()
    plain = with_gradients(layer, layer, residual=True)
    closing = layer_of(kind).double()
    closing.closes = True
    with second_run(Keeper(Kept.SMALL)):
        unread = with_gradients(closing, closing, residual=True)
    for name in plain.keys() - {"out"}:
        torch.testing.assert_close(unread[name], plain[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["frozen", "trained", "lora", "bone"])
def test_what_is_left_out_is_not_computed(kind, monkeypatch):
    layer, calls = layer_of(kind), []
    real = Linear.product
    monkeypatch.setattr(Linear, "product", lambda *a: calls.append(1) or real(*a))
    with second_run(Keeper(Kept.SMALL)):
        layer(rows().requires_grad_())
        assert len(calls) == 1
        layer.closes = True
        layer(rows().requires_grad_())
    assert len(calls) == 1
    layer(rows().requires_grad_())
    assert len(calls) == 2
