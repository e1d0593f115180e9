"""Micro-batches as CUDA graphs: rounding up changes nothing, and a replay is the pass itself."""

import json

import pytest
import pytorch_lightning as pl
import torch
from helpers import pass_in_the_interpreter, with_gradients, wkv6_inputs, wkv7_inputs
from test_lit import Bigram, Group
from test_sft import COUNT, TEXTS, packed, small_model
from torch import nn
from torch.nn import functional as F

from losses.sft import SFT
from peft.apply import random_with_profile
from peft.flags import PeftFlags
from rwkv import offload
from rwkv.batch import TokenBatch, scored_places
from rwkv.config import RWKVConfig, default_ffn, default_ranks
from rwkv.ops.packing import remember_lengths, text_lengths
from rwkv.ops.wkv6 import wkv6
from rwkv.ops.wkv7 import wkv7
from rwkv.training import graphed
from rwkv.training.flags import OptimizerFlags
from rwkv.training.graphed import MOST, GraphedSteps, _HandOver, padded
from rwkv.training.lit import LitModel


def placed(batch: TokenBatch) -> TokenBatch:
    return batch._replace(places=scored_places(batch.mask))


def rows_of(batch: TokenBatch) -> TokenBatch:
    """The same tokens as two rows."""
    half = batch.inputs.shape[1] // 2 * 2
    fields = (field[:, :half].view(2, -1) for field in batch[:3])
    return TokenBatch(*fields, None, batch.count)


@pytest.mark.parametrize("whole", [False, True], ids=["a layer", "a model"])
@pytest.mark.parametrize("rows", [False, True], ids=["packed", "rows"])
def test_rounding_up_changes_neither_loss_nor_gradients(rows, whole):
    batch = packed(TEXTS, COUNT)
    batch = placed(rows_of(batch) if rows else batch)
    more = padded(batch)
    assert more.tokens() > batch.tokens()
    assert rows or (len(more.places) > len(batch.places) and len(more.cu_seqlens) == 9)
    if whole and not rows:  # only kernels take empty texts
        borders = more.cu_seqlens[: len(batch.cu_seqlens) + 1]
        more = more._replace(cu_seqlens=borders)
    model, found = small_model() if whole else Bigram(), []
    for one in (batch, more):
        model.zero_grad()
        loss, metrics = SFT(smoothing=0.1, l2wrap=1e-2)(model, one)
        loss.backward()
        found.append((loss, *metrics.values(), *(p.grad.clone() for p in model.parameters())))
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-8)


def test_rounding_up_twice_is_rounding_up():
    once = padded(placed(packed(TEXTS, COUNT)))
    twice = padded(once)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


def test_a_batch_that_is_all_scored_stays_as_it_is():
    batch = placed(packed([(torch.arange(9), torch.ones(8, dtype=torch.bool))] * 8, 64))
    assert all(a is b for a, b in zip(padded(batch), batch, strict=True))


def test_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-k", "empty_texts")


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
def test_empty_texts_change_nothing(op):
    """Behind the last text, at borders that the caller vouches for."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    run, draw = {"wkv6": (wkv6, wkv6_inputs), "wkv7": (wkv7, wkv7_inputs)}[op]
    inputs = draw(B=1, T=90, H=1, N=64)
    borders = torch.tensor([0, 20, 90])
    more = torch.tensor([0, 20, 90, 90, 90])
    remember_lengths(more, text_lengths(borders))
    state = torch.randn(4, 1, 64, 64)
    want = with_gradients(run, inputs, state[:2], cu_seqlens=borders, backend="triton")
    got = with_gradients(run, inputs, state, cu_seqlens=more, backend="triton")
    for name, value in want.items():
        assert torch.equal(got[name][:2] if "state" in name else got[name], value), name


class Replays(GraphedSteps):
    """Runs the pass where a graph would be replayed, and some passes as usual."""

    calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls % 3 == 2:
            return self._objective(self._model, batch)
        trained = list(self._model.parameters())
        for p in trained:
            self._sums.setdefault(p, torch.zeros_like(p))
        self._begin(trained)
        loss, metrics = self._objective(self._model, batch)
        for p, more in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            self._sums[p] += more
        anchor = torch.zeros((), requires_grad=True)
        return _HandOver.apply(anchor, loss.detach(), self._sums, trained), metrics


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_trains_the_same_on_replays(tmp_path, accumulate):
    found = []
    for replays in (False, True):
        torch.manual_seed(0)
        model, objective = Bigram(), SFT()
        batches = [placed(packed(TEXTS[n % 3 :], COUNT)) for n in range(4 * accumulate)]
        lit = LitModel(
            model,
            objective,
            [Group(list(model.parameters()))],
            OptimizerFlags(lr_init=0.1),
            strategy="auto",
            loader=lambda rank, some=batches: torch.utils.data.DataLoader(some, batch_size=None),
            graphs=Replays(model, objective) if replays else None,
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=4,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(lit)
        found.append([p.detach().clone() for p in model.parameters()])
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-7)


def gpu_batch(lengths: list[int], scored: int, seed: int) -> TokenBatch:
    """Packed texts of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    tokens = torch.randint(512, (T + 1,), generator=draw)
    mask = (torch.randperm(T, generator=draw) < scored)[None]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    batch = TokenBatch(tokens[None, :-1], tokens[None, 1:], mask, borders, torch.tensor(T))
    places = scored_places(mask)
    moved = TokenBatch(*(x.cuda() for x in batch._replace(places=places)))
    remember_lengths(moved.cu_seqlens, lengths)
    return padded(moved)


@pytest.mark.gpu
@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize(
    ("mode", "quant"), [("full", ""), ("lora", "none"), ("lora", "nf4"), ("bone", "fp8")]
)
@pytest.mark.parametrize(
    ("grad_cp", "offload"), [(True, False), ("selective", False), (True, True)]
)
def test_a_graph_gives_the_bits_of_the_pass(version, mode, quant, grad_cp, offload, tmp_path):
    """Batches of one shape that differ in all else, two to a step, weights changed in between."""
    rule = {"match": "blocks.*", "mode": mode, "rank": 16, "quant": quant}
    if mode == "full":
        rule = {"match": "*", "mode": mode}
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"rules": [rule, {"match": "emb", "quant": quant or "none"}]}))
    config = RWKVConfig(
        version=version,
        n_layer=2,
        n_embd=256,
        dim_ffn=default_ffn(version, 256),
        vocab_size=512,
        head_size=64,
        ranks=default_ranks(version, 256),
    )
    lengths = ([200, 300, 12], [100, 100, 100, 100, 100], [490], [1, 2, 3, 491])
    batches = [gpu_batch(some, 130 + 8 * n, n) for n, some in enumerate(lengths * 2)]
    assert len({tuple(x.shape for x in batch) for batch in batches}) == 1
    found, kept = [], torch.empty(512, config.n_embd, dtype=torch.bfloat16)
    for recording in (False, True):
        torch.manual_seed(1)
        model, _ = random_with_profile(
            config, PeftFlags(layer_profile=str(profile)), device="cuda", dtype=torch.bfloat16
        )
        model.grad_cp, model.grad_cp_offload = grad_cp, offload
        graphs, seen = GraphedSteps(model, SFT()), []
        trained = [p for p in model.parameters() if p.requires_grad]
        for number, batch in enumerate(batches):
            loss, metrics = graphs(batch) if recording else SFT()(model, batch)
            loss.backward()
            seen += [loss.detach(), *metrics.values()]
            if number % 2:
                seen += [p.grad.clone() for p in trained if p.grad is not None]
                with torch.no_grad():
                    for p in trained:
                        if p.grad is not None:
                            p -= 0.1 * p.grad
                model.zero_grad()
            del loss  # whose history would keep a node of each parameter from stream to stream
            # over what pinned memory was given back
            others = [torch.full_like(kept, 7.0, pin_memory=True) for _ in range(16)]
            assert all(other.is_pinned() for other in others)
        assert not graphs.failed
        assert len(graphs._recorded) == recording
        found.append(seen)
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


class Recording(Exception):
    """In place of a graph, for which it takes a GPU."""


@pytest.fixture
def coming(monkeypatch):
    """(graphs, come, recorded): come(length) brings a batch; recorded has what was to be."""
    graphs = GraphedSteps(nn.Linear(1, 1), lambda model, batch: (batch.inputs.sum(), {}))
    recorded = []

    def record(batch):
        recorded.append(batch.inputs.shape[1])
        raise Recording

    def come(length):
        some = torch.ones(1, length, dtype=torch.int64)
        graphs(TokenBatch(some, some, some > 0, None, some.sum(), torch.arange(length)))

    monkeypatch.setattr(graphs, "_record", record)
    monkeypatch.setattr(graphed, "memory_missing", lambda: "")
    return graphs, come, recorded


def test_a_shape_that_comes_once_takes_no_place(coming):
    """Of shapes that come again, so many are recorded as may be, whatever came before."""
    _, come, recorded = coming
    lengths = [graphed.LARGEST_STEP * (n + 1) for n in range(2 * MOST)]
    for length in lengths:
        come(length)
    assert not recorded
    with pytest.raises(Recording):
        come(lengths[MOST])
    assert recorded == [lengths[MOST]]


def test_rows_that_are_full_to_some_percent_have_few_shapes(coming):
    _, come, recorded = coming
    for length in (3900, 3700, 3500):
        come(length)
    assert not recorded
    for length in (4090, 3840, 3400):
        with pytest.raises(Recording):
            come(length)
    assert recorded == [4096, 3840, 3584]


def test_the_first_graph_waits_for_the_second_step(coming):
    """Until then the optimizer holds nothing."""
    graphs, come, recorded = coming
    weight = graphs._model.weight
    come(8)
    weight.grad = torch.ones_like(weight)
    come(8)
    assert not recorded
    weight.grad = None
    with pytest.raises(Recording):
        come(8)


def test_nothing_is_recorded_without_memory(coming, monkeypatch, capsys):
    graphs, come, recorded = coming
    monkeypatch.setattr(graphed, "memory_missing", lambda: "a graph takes 3.0 GiB")
    for _ in range(3):
        come(8)
    assert not recorded and graphs.failed
    said = capsys.readouterr().err
    assert said.count("--cuda_graphs: a graph takes 3.0 GiB; going on kernel by kernel") == 1


class Played:
    """In place of a graph."""

    replays = 0

    def replay(self):
        self.replays += 1


def test_what_was_recorded_is_replayed_when_another_shape_cannot_be(coming, monkeypatch):
    graphs, come, _ = coming
    graph, zero = Played(), torch.zeros(())

    def record(batch):
        if batch.inputs.shape[1] == 8:
            return graphed._Recorded(graph, batch, zero, {}, [])
        graphs.failed = "out of memory"
        return None

    monkeypatch.setattr(graphs, "_record", record)
    for length in (8, 8, 512, 512, 8, 512, 8):
        come(length)
    assert graph.replays == 3 and graphs.failed


def test_once_recording_failed_steps_take_nothing_for_it(coming, monkeypatch):
    graphs, come, _ = coming
    found = []

    def objective(model, batch):
        found.append((batch.inputs.shape[1], offload._buffers.get()))

    monkeypatch.setattr(graphs, "_objective", objective)
    come(1023)
    graphs.failed = "no room"
    come(1023)
    assert found == [(1024, graphs._host), (1023, None)]


@pytest.mark.parametrize(
    "free, share, missing",
    [(4.0, 1.0, ""), (2.9, 1.0, "3.0 GiB, and 2.9 are"), (9.0, 0.5, "3.0 GiB, and 2.0 are")],
)
def test_a_step_must_fit_once_more(free, share, missing, monkeypatch):
    """Of 24 GiB torch holds 10 and has handed out 7; a process may be held to a share of all."""
    gib = 2**30
    for name, value in (
        ("memory_reserved", 10 * gib),
        ("memory_allocated", 7 * gib),
        ("mem_get_info", (int(free * gib), 24 * gib)),
        ("get_per_process_memory_fraction", share),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    found = graphed.memory_missing()
    assert missing in found and bool(found) == bool(missing)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_goes_on_without(capsys):
    model = nn.Linear(4, 4, device="cuda")

    def waits(model, batch):
        loss = F.relu(model(batch.inputs.float())).sum()
        loss.item()
        return loss, {}

    graphs = GraphedSteps(model, waits)
    some = torch.ones(1, 4, dtype=torch.int64, device="cuda")
    batch = TokenBatch(some, some, some > 0, None, some.sum(), torch.arange(4, device="cuda"))
    for _ in range(3):
        loss, _ = graphs(batch)
        loss.backward()
        assert model.weight.grad is not None
        model.zero_grad()
        del loss
    assert torch.rand(4, device="cuda").isfinite().all()
    assert graphs.failed and capsys.readouterr().err.count("cannot be recorded") == 1
