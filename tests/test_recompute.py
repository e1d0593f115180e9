"""Recomputation: the gradient of a plain call, with and without ZeRO-3's scattered parameters.

DeepSpeed itself is tried in test_deepspeed.py; here its mark on the parameters alone.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from test_sft import small_model
from torch import Tensor, nn

from peft.apply import random_with_profile
from peft.flags import PeftFlags
from peft.registry import make_adapter
from rwkv.config import LowRanks, RWKVConfig
from rwkv.linear import Linear
from rwkv.offload import HostPlace
from rwkv.ops.kept import register_gradient
from rwkv.recompute import recomputed
from rwkv.state import LayerState


def mark_scattered(model: nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
@pytest.mark.parametrize("trained", ["", "att.", "ln_out"], ids=["all", "time mix", "last norm"])
def test_recomputed_blocks_give_the_plain_gradient(version, scattered, trained):
    """Through hidden states and every state, for all parameters that train."""
    gradients = []
    for again in (False, True):
        model = small_model(version).double()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name and not name.startswith("head"))
        model.grad_cp = again
        if scattered and again:
            mark_scattered(model)
        tokens = torch.arange(14).view(2, 7)
        hidden, state = model(tokens)
        total = hidden.square().sum()
        for layer in state:
            total = total + sum(field.double().square().sum() for field in layer)
        total.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, got = gradients
    assert plain.keys() == got.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def adapted_model(version: int, mode: str) -> nn.Module:
    """A float32 model with an adapter on every linear layer of its blocks; "full": without."""
    torch.manual_seed(0)
    model = small_model(version)
    if mode == "full":
        return model
    model.requires_grad_(False)
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, Linear):
            model.blocks.set_submodule(name, make_adapter(mode, layer, rank=8, scale=2.0))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def run_backward(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    hidden, state = model(torch.arange(14).view(2, 7) % 37, **options)
    (hidden.square().sum() + sum(layer.wkv.square().sum() for layer in state)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("mode", ["full", "lora", "bone", "miss", "dora"])
def test_halves_that_leave_out_their_last_product_give_the_same_bits(version, mode):
    plain, again = adapted_model(version, mode), adapted_model(version, mode)
    again.grad_cp = True
    want, got = run_backward(plain), run_backward(again)
    assert got.keys() == want.keys() and want
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_what_waits_in_host_memory_gives_the_same_bits(version, mode, scattered):
    models = [adapted_model(version, mode) for _ in range(2)]
    for model in models:
        model.grad_cp = True
        if scattered:
            mark_scattered(model)
    models[1].grad_cp_offload = True
    want, got = (run_backward(model) for model in models)
    assert got.keys() == want.keys() and want
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


def test_only_the_stream_leaves_for_host_memory(monkeypatch):
    """Two inputs a block; the first layer's values and the states serve all blocks."""
    model, left = adapted_model(7, "lora"), []
    model.grad_cp = model.grad_cp_offload = True
    real = HostPlace._pack

    def watched(place, x):
        kept = real(place, x)
        if kept is not x:
            left.append(x.shape)
        return kept

    monkeypatch.setattr(HostPlace, "_pack", watched)
    run_backward(model)
    assert left == [(2, 7, model.config.n_embd)] * 2 * model.config.n_layer


@pytest.mark.gpu
def test_what_waits_in_host_memory_leaves_the_gpu():
    """16 half blocks of 2 MiB: with it, a few are on their way."""
    config = RWKVConfig(
        version=7, n_layer=8, n_embd=256, dim_ffn=1024, vocab_size=64, head_size=64,
        ranks=LowRanks(32, 32, 32, 32, 32),
    )  # fmt: skip
    model, _ = random_with_profile(config, PeftFlags(), device="cuda", dtype=torch.bfloat16)
    model.grad_cp = True
    tokens = torch.randint(64, (1, 4096), device="cuda")
    kept, gradients = [], []
    for model.grad_cp_offload in (False, True, True):
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        hidden, _ = model(tokens)
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated() - before)
        hidden.float().square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        del hidden
    assert kept[0] - kept[2] > 24 << 20
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[2][name], gradient), name


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("mode", ["full", "lora", "bone"])
def test_the_last_product_of_a_half_runs_once(version, mode, monkeypatch):
    """All others run twice; RWKV-6's channel mix multiplies its last product by a gate."""
    model, runs = adapted_model(version, mode), Counter()
    model.grad_cp = True
    real = Linear.product

    def counted(layer, *args):
        runs[layer] += 1
        return real(layer, *args)

    monkeypatch.setattr(Linear, "product", counted)
    run_backward(model)
    once = {"att.output"} | ({"ffn.value"} if version == 7 else set())
    for name, layer in model.blocks.named_modules():
        if isinstance(layer, Linear):
            assert runs[layer] == (1 if name[2:] in once else 2), name


def test_dropout_of_adapters_is_repeated():
    """The gradient in lora_B is linear in what dropout left of x: it tells the masks apart."""
    gradients = []
    for again in (False, True):
        model = adapted_model(7, "lora")
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.5
        model.grad_cp = again
        torch.manual_seed(5)
        gradients.append(run_backward(model))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_model_within_another_recomputation_computes_what_is_read():
    """The pieces of a long text: the second run of the outer one has to give true values."""
    results = []
    for outer in (False, True):
        model = adapted_model(7, "lora")
        model.grad_cp = outer

        def run(tokens, model=model):
            hidden, _ = model(tokens)
            return hidden.square()

        tokens = torch.arange(14).view(2, 7)
        out = recomputed(run, tokens, model=model) if outer else run(tokens)
        out.sum().backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
def test_random_draws_are_repeated(scattered):
    """Were they not, the gradient of x dropped out would differ from the mask of the result."""
    layer = nn.Linear(4, 4)
    if scattered:
        mark_scattered(layer)
    x = torch.ones(64, requires_grad=True)
    dropped = recomputed(lambda t: nn.functional.dropout(t.exp(), 0.5).square(), x, model=layer)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, 2 * dropped.detach())


def test_results_keep_their_structure():
    layer = nn.Linear(3, 3)
    mark_scattered(layer)

    def run(x):
        return layer(x), [LayerState(x, layer(x), x.detach())], None, 7

    out, (state,), nothing, seven = recomputed(run, torch.ones(2, 3), model=layer)
    assert isinstance(state, LayerState) and nothing is None and seven == 7
    assert out.requires_grad and not state.ffn_shift.requires_grad
    (out.sum() + state.wkv.sum()).backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((3, 3), 4.0))


def test_a_recomputed_operator_gets_the_borders_themselves():
    """What `packing.known` has of cu_seqlens it has of one object, all through a step."""
    seen = []

    @torch.library.custom_op("test::kept_borders", mutates_args=())
    def forward(
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        cu_seqlens: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(cu_seqlens)
        return r + w, state.clone(), r.clone()

    def backward(*given: Any) -> tuple[Tensor, ...]:
        seen.append(given[6])
        return *(torch.ones_like(given[0]) for _ in range(6)), torch.ones_like(given[8])

    register_gradient(forward, backward)
    borders, x = torch.tensor([0, 3, 5]), torch.ones(5, requires_grad=True)

    def run(x: Tensor, borders: Tensor) -> Tensor:
        return forward(x, x, x, x, x, x, x, borders, True)[0]

    recomputed(run, x, borders, model=nn.Linear(1, 1)).sum().backward()
    assert len(seen) == 3  # the first run, the second one, the gradient
    assert all(one is borders for one in seen)
    assert x.grad is not None and x.grad.tolist() == [7.0] * 5
