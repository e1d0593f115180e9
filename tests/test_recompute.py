"""Recomputation: the gradient of a plain call, with and without ZeRO-3's scattered parameters.

DeepSpeed itself is tried in test_deepspeed.py; here its mark on the parameters alone.
"""

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from test_sft import small_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import rwkv.model
from peft import lora
from peft.apply import random_with_profile
from peft.flags import PeftFlags
from peft.registry import make_adapter
from rwkv.config import LowRanks, RWKVConfig, default_ranks
from rwkv.keeper import Keeper, Kept, keeping
from rwkv.linear import Linear
from rwkv.offload import HostBuffers, HostPlace
from rwkv.ops import low_rank, wkv6_torch, wkv7_torch
from rwkv.ops.kept import register_gradient
from rwkv.recompute import recomputed
from rwkv.state import LayerState


def mark_scattered(model: nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
@pytest.mark.parametrize("trained", ["", "att.", "ln_out"], ids=["all", "time mix", "last norm"])
@pytest.mark.parametrize("grad_cp", [True, "selective"])
def test_recomputed_blocks_give_the_plain_gradient(version, scattered, trained, grad_cp):
    """Through hidden states and every state, for all parameters that train."""
    gradients = []
    for again in (False, grad_cp):
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


def adapted_model(version: int, mode: str, *, backend: str = "torch", rank: int = 8) -> nn.Module:
    """A float32 model with an adapter on every linear layer of its blocks; "full": without."""
    torch.manual_seed(0)
    model = small_model(version)
    for block in model.blocks:
        block.att.backend = backend
    if mode == "full":
        return model
    model.requires_grad_(False)
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, Linear):
            model.blocks.set_submodule(name, make_adapter(mode, layer, rank=rank, scale=2.0))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def run_backward(model: nn.Module, rows: int = 2, **options) -> dict[str, torch.Tensor]:
    hidden, state = model(torch.arange(14).view(rows, -1) % 37, **options)
    (hidden.square().sum() + sum(layer.wkv.square().sum() for layer in state)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("mode", ["full", "lora", "bone", "miss", "dora", "dora_column", "pissa"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("grad_cp", [True, "selective"])
def test_halves_that_leave_out_or_keep_products_give_the_same_bits(version, mode, packed, grad_cp):
    plain, again = adapted_model(version, mode), adapted_model(version, mode)
    again.grad_cp = grad_cp
    options = {"rows": 1, "cu_seqlens": torch.tensor([0, 3, 4, 14])} if packed else {}
    want, got = run_backward(plain, **options), run_backward(again, **options)
    assert got.keys() == want.keys() and want
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("grad_cp", [True, "selective"])
def test_what_waits_in_host_memory_gives_the_same_bits(version, mode, scattered, grad_cp):
    models = [adapted_model(version, mode) for _ in range(2)]
    for model in models:
        model.grad_cp = grad_cp
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


def test_recorded_passes_share_the_host_memory_that_stays(monkeypatch):
    """In a pass no two tensors share any, a larger pass leaves that of a smaller graph alone."""
    plain, model = (adapted_model(7, "lora") for _ in range(2))
    plain.grad_cp = model.grad_cp = model.grad_cp_offload = True
    buffers, places = HostBuffers(), []
    for length, recorded in ((5, False), (7, False), (7, True), (14, False), (7, False)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=recorded: now)
        tokens = torch.arange(length)[None] % 37
        plain(tokens)[0].square().sum().backward()
        with buffers:
            model(tokens)[0].square().sum().backward()
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            assert one.grad is other.grad or torch.equal(one.grad, other.grad)
        places.append([buffer.data_ptr() for buffer in buffers._buffers])
        assert len(set(places[-1])) == 2 * model.config.n_layer
        for some in (plain, model):
            some.zero_grad()
    assert places[1] == places[2] and places[3] == places[4]
    assert [buffer.data_ptr() for buffer in buffers._recorded] == places[1]


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


@pytest.mark.gpu
@pytest.mark.parametrize(("version", "kernel"), [(6, "triton"), (7, "triton"), (7, "cuda")])
@pytest.mark.parametrize(
    ("mode", "quant"), [("full", ""), ("lora", "none"), ("lora", "nf4"), ("bone", "fp8")]
)
def test_a_gpu_gives_the_same_bits(version, kernel, mode, quant, tmp_path, monkeypatch):
    """And holds between the passes more with `selective` than with 1, and less than with 0.

    Last with 1 and with what the last block keeps of many tokens.
    """
    rule = {"match": "blocks.*", "mode": mode, "rank": 16, "quant": quant}
    if mode == "full":
        rule = {"match": "*", "mode": mode}
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"rules": [rule]}))
    config = RWKVConfig(
        version=version, n_layer=3, n_embd=256, dim_ffn=1024, vocab_size=64, head_size=64,
        ranks=default_ranks(version, 256),
    )  # fmt: skip
    model, _ = random_with_profile(
        config, PeftFlags(layer_profile=str(profile)), device="cuda", dtype=torch.bfloat16,
        backend=kernel,
    )  # fmt: skip
    tokens = torch.randint(64, (1, 2048), device="cuda")
    borders = torch.tensor([0, 700, 701, 2048], device="cuda")
    kept, gradients = [], []
    for number, grad_cp in enumerate((False, False, "selective", True, True)):  # the first compiles
        model.grad_cp = grad_cp
        monkeypatch.setattr(rwkv.model, "keeps_end", lambda *_, ends=number == 4: ends)
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        hidden = model(tokens, None, borders, final_states=0)[0]
        kept.append(torch.cuda.memory_allocated() - before)
        hidden.float().square().sum().backward()
        del hidden
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert kept[1] > kept[2] > kept[4] > kept[3]
    for again in gradients[1:]:
        assert again.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            assert torch.equal(again[name], gradient), name


@pytest.fixture
def runs(monkeypatch) -> Counter:
    """How often each linear layer's product was computed."""
    counts, real = Counter(), Linear.product

    def counted(layer, *args):
        counts[layer] += 1
        return real(layer, *args)

    monkeypatch.setattr(Linear, "product", counted)
    return counts


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("mode", ["full", "lora", "bone", "miss"])
@pytest.mark.parametrize("grad_cp", [True, "selective"])
def test_the_last_product_of_a_half_runs_once(version, mode, grad_cp, runs):
    """All others run twice, but if they are kept; RWKV-6's channel mix gates its last product."""
    model = adapted_model(version, mode)
    model.grad_cp = grad_cp
    run_backward(model)
    once = {"att.output"} | ({"ffn.value"} if version == 7 else set())
    for name, layer in model.blocks.named_modules():
        if isinstance(layer, Linear):
            assert runs[layer] == (1 if name[2:] in once or grad_cp == "selective" else 2), name


@pytest.mark.parametrize("mode", ["full", "lora", "bone", "miss"])
@pytest.mark.parametrize(
    ("grad_cp", "offload", "limit"),
    [(True, False, 0), (True, True, 0), ("selective", False, 1)],
    ids=["all", "offload", "limited"],
)
def test_where_the_backward_pass_begins_all_runs_once(
    mode, grad_cp, offload, limit, runs, monkeypatch
):
    """Of many tokens, where nothing reads the states after them."""
    monkeypatch.setattr(rwkv.model, "keeps_end", lambda config, tokens: tokens == 14)
    model, plain = (adapted_model(7, mode) for _ in range(2))
    model.grad_cp, model.grad_cp_offload, model.grad_cp_memory = grad_cp, offload, limit
    tokens, gradients = torch.arange(14).view(2, 7), []
    for some in (plain, model):
        hidden, _ = some(tokens, final_states=0)
        hidden.square().sum().backward()
        gradients.append({n: p.grad for n, p in some.named_parameters() if p.grad is not None})
    once, counts = (
        [[runs[x] for x in block.modules() if isinstance(x, Linear)] for block in some.blocks]
        for some in (plain, model)
    )
    assert counts[-1] == once[-1] and counts[0] > once[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("states", [None, 1])
def test_where_states_are_read_the_last_block_runs_again(states, runs, monkeypatch):
    monkeypatch.setattr(rwkv.model, "keeps_end", lambda *_: True)
    model = adapted_model(7, "lora")
    model.grad_cp = True
    hidden, _ = model(torch.arange(14).view(2, 7), final_states=states)
    hidden.sum().backward()
    assert runs[model.blocks[-1].ffn.key] == 2


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
@pytest.mark.parametrize("trained", ["ffn.key", "att.output", "att.key"])
def test_below_the_lowest_adapter_there_is_no_gradient(version, grad_cp, trained, monkeypatch):
    """Only what is computed from the adapter's output in its own block, the last, has one."""
    model, calls = small_model(version).requires_grad_(False), Counter()
    model.grad_cp = grad_cp
    last = model.blocks[-1]
    last.set_submodule(
        trained, make_adapter("lora", last.get_submodule(trained), rank=4, scale=1.0)
    )
    real = Linear.gradient

    def counted(layer, *args):
        calls[layer] += 1
        return real(layer, *args)

    monkeypatch.setattr(Linear, "gradient", counted)
    run_backward(model)
    above = {"ffn.key": ["ffn.value"]}
    above["att.output"] = ["ffn.key", *above["ffn.key"], *(["ffn.receptance"] * (version == 6))]
    above["att.key"] = ["att.output", *above["att.output"]]
    assert calls == {last.get_submodule(name): 1 for name in above[trained]}


@pytest.mark.parametrize("version", [6, 7])
def test_within_a_limit_late_blocks_keep_products_first(version):
    """Two blocks of 64 numbers of ffn.key and 32 of each other product a token, in float32.

    Of wkv a chunk of each row counts on top.
    """
    model = adapted_model(version, "lora")
    model.grad_cp = "selective"
    x = torch.empty(2, 7, 32)
    products = 14 * 4 * (64 + 3 * 32 + {7: 0, 6: 3 * 32}[version])  # gate, receptance, ffn.value
    kept = {7: 7.4 * (1 + 64 * 2 / 14), 6: 4.3 * (1 + 32 * 2 / 14)}[version]
    wkv = math.ceil(14 * 32 * (4 + kept))
    for limit, levels in {
        products - 1: (Kept.SMALL, Kept.SMALL),
        products: (Kept.SMALL, Kept.PRODUCTS),
        2 * products: (Kept.PRODUCTS, Kept.PRODUCTS),
        2 * products + wkv: (Kept.PRODUCTS, Kept.ALL),
        2 * products + 2 * wkv: (Kept.ALL, Kept.ALL),
    }.items():
        model.grad_cp_memory = limit
        assert model._kept_by_blocks(x, 2) == list(levels)


def test_a_limit_changes_no_gradient():
    found = []
    for limit in (0, 5000, 14 * 4 * 160, 14 * 4 * 400):
        model = adapted_model(7, "lora")
        model.grad_cp, model.grad_cp_memory = "selective", limit
        run_backward(model)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for got in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, found[0], strict=True))


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize(("grad_cp", "runs"), [(False, 2), (True, 3), ("selective", 2)])
def test_selective_runs_wkv_once_each_way(version, grad_cp, runs, monkeypatch):
    """Each way an operator in plain torch looks at its chunks once."""
    module, looks = {6: wkv6_torch, 7: wkv7_torch}[version], []

    class Counted(module._Local):
        def __init__(self, *args):
            looks.append(1)
            super().__init__(*args)

    monkeypatch.setattr(module, "_Local", Counted)
    model = adapted_model(version, "lora")
    model.grad_cp = grad_cp
    run_backward(model)
    assert len(looks) == runs * model.config.n_layer


@pytest.mark.parametrize(
    ("grad_cp", "offload"),
    [(False, False), (True, False), (True, True), ("selective", False), ("selective", True)],
)
@pytest.mark.parametrize(
    ("version", "products", "closing"), [(6, 2 * (2 + 8), 2), (7, 3 + 4 + 2 * 6, 4)]
)
def test_products_of_low_rank_are_kept(version, products, closing, grad_cp, offload, monkeypatch):
    """LoRA's x A^T and the time mix's own: they are small, and x is wide.

    Where memory is what counts, that of the layer whose result is left out alone.
    """
    runs = []
    for module in (lora, low_rank):
        monkeypatch.setattr(
            module,
            "kept_result",
            lambda compute, kept, real=module.kept_result: real(
                lambda: runs.append(1) or compute(), kept
            ),
        )
    model = adapted_model(version, "lora")
    model.grad_cp, model.grad_cp_offload = grad_cp, offload
    run_backward(model)
    again = products - closing if (grad_cp, offload) == (True, True) else 0
    assert len(runs) == products + again


def test_what_is_kept_is_freed_as_it_is_taken(monkeypatch):
    """And all of it by the end, though the graph is still held."""
    model, kept, left = adapted_model(7, "lora"), [], []
    model.grad_cp = "selective"
    keep, empty = Keeper.keep, Keeper.empty

    def alive() -> int:
        return sum(not one.expired() for one in kept)

    def noted(keeper: Keeper, results: Any) -> Any:
        kept.extend(StorageWeakRef(x.untyped_storage()) for x in results)
        return keep(keeper, results)

    monkeypatch.setattr(Keeper, "keep", noted)
    monkeypatch.setattr(Keeper, "empty", lambda keeper: left.append(alive()) or empty(keeper))
    hidden = model(torch.arange(14).view(2, 7))[0]
    before = alive()
    assert before == len(kept) > 0
    total = hidden.square().sum()
    total.backward()
    assert len(left) == 2 * model.config.n_layer and left == sorted(left, reverse=True)
    assert left[-1] < before / 2
    assert alive() == 0


@pytest.mark.parametrize("grad_cp", [True, "selective"])
def test_a_graph_that_is_retained_is_run_again(grad_cp):
    """The second time nothing is kept any more, and all is computed."""
    model = adapted_model(7, "lora")
    model.grad_cp = grad_cp
    hidden, _ = model(torch.arange(14).view(2, 7))
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    first, second = (
        torch.autograd.grad(hidden.square().sum(), trained, retain_graph=True, allow_unused=True)
        for _ in range(2)
    )
    assert any(x is not None for x in first)
    for one, two in zip(first, second, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_blocks_that_nothing_learns_in_keep_nothing(monkeypatch):
    model, kept = adapted_model(7, "full"), []
    model.grad_cp = "selective"
    model.requires_grad_(False)
    model.ln_out.requires_grad_(True)
    real = Keeper.keep

    def noted(keeper: Keeper, results: Any) -> Any:
        kept.extend(StorageWeakRef(x.untyped_storage()) for x in results)
        return real(keeper, results)

    monkeypatch.setattr(Keeper, "keep", noted)
    hidden, state = model(torch.arange(14).view(2, 7))
    del state
    assert kept and all(one.expired() for one in kept)
    with torch.no_grad():
        kept.clear()
        model(torch.arange(14).view(2, 7))
    assert not kept and hidden.requires_grad


@pytest.mark.parametrize("grad_cp", [True, "selective"])
def test_dropout_of_adapters_is_repeated(grad_cp):
    """The gradient in lora_B is linear in what dropout left of x: it tells the masks apart."""
    gradients = []
    for again in (False, grad_cp):
        model = adapted_model(7, "lora")
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.5
        model.grad_cp = again
        torch.manual_seed(5)
        gradients.append(run_backward(model))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("grad_cp", [True, "selective"])
@pytest.mark.parametrize("version", [6, 7])
def test_a_model_within_another_recomputation_computes_what_is_read(version, grad_cp):
    """The pieces of a long text: the second run of the outer one has to give true values."""
    results = []
    for outer in (False, grad_cp):
        model = adapted_model(version, "lora")
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


@pytest.mark.parametrize("selective", [False, True], ids=["all", "selective"])
def test_a_recomputed_operator_gets_the_borders_themselves(selective):
    """What `packing.known` has of cu_seqlens it has of one object, all through a step."""
    seen = []

    @torch.library.custom_op(f"test::kept_borders_{selective}", mutates_args=())
    @keeping
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
        assert given[8] is None  # nothing read S_T
        return tuple(torch.ones_like(given[0]) for _ in range(7))

    register_gradient(forward, backward)
    borders, x = torch.tensor([0, 3, 5]), torch.ones(5, requires_grad=True)

    def run(x: Tensor, borders: Tensor) -> Tensor:
        return forward(x, x, x, x, x, x, x, borders, True)[0]

    options = {"closed": True, "kept": Kept.ALL if selective else Kept.SMALL}
    recomputed(run, x, borders, model=nn.Linear(1, 1), **options).sum().backward()
    assert len(seen) == 3 - selective  # the first run, the second one, the gradient
    assert all(one is borders for one in seen)
    assert x.grad is not None and x.grad.tolist() == [7.0] * 5
