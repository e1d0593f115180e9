"""State tuning: the state that texts start from trains, and every reader takes it up."""

import argparse
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from parity_rwkv import ask_peer, skip_without_peer
from test_infctx import byte_model
from test_sft import packed, padded, small_model, texts
from torch.nn import functional as F

import train
from data.pair_pieces import Pair, make_batch
from losses.preference import answer_log_probs
from losses.sft import SFT
from peft import merge
from peft.apply import apply_profile
from peft.flags import PeftFlags
from peft.groups import parameter_groups
from peft.tuned_state import add_prefix, add_tuned_state
from rwkv.checkpoint import load_model, read_metadata, read_tensors, write_tensors
from rwkv.chunks import ChunkPlan
from rwkv.errors import InputError
from rwkv.ops import wkv6, wkv7
from rwkv.runner import add_model_arguments, load_start, load_state, open_model, put_adapter
from rwkv.state import state_tensors
from rwkv.training.flags import OptimizerFlags
from rwkv.training.saving import Saving
from rwkv.training.step_log import read_log

TEXTS = texts([9, 4, 17, 6])
COUNT = sum(int(mask.sum()) for _, mask in TEXTS)
STATE_LAYOUT = (2, 16, 16)
LAYERS = [f"blocks.{n}.att.time_state" for n in range(2)]


def tuned(version: int) -> torch.nn.Module:
    """A frozen model with a state that is not zero."""
    model = small_model(version).requires_grad_(False)
    add_tuned_state(model)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_(generator=torch.Generator().manual_seed(3))
    return model


def state_gradients(model, batches, objective=None):
    model.zero_grad()
    for batch in batches:
        (objective or SFT())(model, batch)[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("version", [6, 7])
def test_a_new_state_changes_nothing(version):
    model, tokens = small_model(version), torch.arange(9)[None]
    before, _ = model(tokens)
    add_tuned_state(model)
    assert torch.equal(model(tokens)[0], before)


@pytest.mark.parametrize("version", [6, 7])
def test_the_gradient_against_differences(version):
    """In float64, in three places of each layer's state."""
    model, batch = tuned(version).double(), packed(TEXTS, COUNT)
    objective = SFT(l2wrap=0)
    found = state_gradients(model, [batch], objective)
    assert found.keys() == set(LAYERS)
    for name, gradient in found.items():
        state = model.get_parameter(name)
        for place in ((0, 3, 5), (1, 0, 15), (1, 15, 2)):
            with torch.no_grad():
                state[place] += 1e-5
                up = objective(model, batch)[0].item()
                state[place] -= 2e-5
                down = objective(model, batch)[0].item()
                state[place] += 1e-5
            assert gradient[place].item() == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize(
    "cut_as",
    {
        "a micro-batch of four": [padded(TEXTS, COUNT)],
        "two of two": [padded(TEXTS[:2], COUNT), padded(TEXTS[2:], COUNT)],
        "packed": [packed(TEXTS, COUNT)],
    }.items(),
    ids=lambda pair: pair[0],
)
def test_any_micro_batch_and_packing(cut_as, version):
    """Every text starts from the one state, and all their gradients add up in it."""
    model = tuned(version).double()
    expected = state_gradients(model, [padded([text], COUNT) for text in TEXTS])
    for name, gradient in state_gradients(model, cut_as[1]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("version, table", [(6, wkv6.BACKENDS), (7, wkv7.BACKENDS)])
def test_every_backend_that_runs_here(version, table):
    found = {}
    for backend in table:
        model = tuned(version)
        for block in model.blocks:
            block.att.backend = backend
        try:
            found[backend] = state_gradients(model, [packed(TEXTS, COUNT)])
        except RuntimeError as error:
            assert "cannot run" in str(error)
    assert {"torch", "reference"} <= found.keys()
    for backend, gradients in found.items():
        for name, want in found["reference"].items():
            error = (gradients[name] - want).norm() / want.norm()
            assert error < 1e-4, f"{backend}: {name}: {error:.1e}"


def test_it_stays_float32_in_a_bfloat16_model():
    model = small_model().to(torch.bfloat16)
    add_tuned_state(model)
    assert {block.att.time_state.dtype for block in model.blocks} == {torch.float32}
    loss, _ = SFT()(model, packed(TEXTS, COUNT))
    loss.backward()
    assert model.blocks[1].att.time_state.grad.dtype == torch.float32


def test_rates_are_the_profiles(tmp_path):
    """The state's own rates and no weight decay; the adapters keep theirs."""
    rule = {"match": "blocks.*", "mode": "lora", "rank": 4, "lr_init": 1e-4, "lr_final": 1e-5}
    rule |= {"state_lr_init": 0.5, "state_lr_final": 0.05, "weight_decay": 0.1}
    (tmp_path / "p.json").write_text(json.dumps({"rules": [rule]}))
    model = small_model()
    plan = apply_profile(model, PeftFlags(layer_profile=str(tmp_path / "p.json")))
    add_tuned_state(model)
    groups = parameter_groups(model, plan, OptimizerFlags())
    (state,) = (group for group in groups if group.name == "state")
    assert list(state.names) == LAYERS
    assert (state.lr_init, state.lr_final, state.weight_decay) == (0.5, 0.05, 0.0)
    assert {group.lr_init for group in groups if "adapters" in group.name} == {1e-4}


def with_prefix(version: int, length: int = 5) -> torch.nn.Module:
    """A frozen model with a prefix that trains."""
    model = small_model(version).requires_grad_(False)
    torch.manual_seed(2)
    add_prefix(model, length)
    return model


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("state", [False, True], ids=["alone", "after a state"])
def test_a_prefix_is_read_before_the_text(version, state):
    """Logits and the gradient of the prefix are those of a row that begins with it."""
    model = with_prefix(version).double()
    if state:
        add_tuned_state(model)
        for block in model.blocks:
            torch.nn.init.normal_(block.att.time_state)
    tokens, mask = TEXTS[2]
    found = state_gradients(model, [padded([(tokens, mask)], COUNT)], SFT(l2wrap=0))
    prefix, model.prefix = model.prefix, None
    row = torch.cat([prefix, model.emb(tokens[:-1])])
    hidden, _ = model.run_blocks(row.unsqueeze(0))
    logits = model.logits(hidden[0, len(prefix) :])[mask]
    prefix.grad = None
    F.cross_entropy(logits, tokens[1:][mask], reduction="sum").div(COUNT).backward()
    torch.testing.assert_close(found["prefix"], prefix.grad, rtol=1e-9, atol=1e-12)
    assert ("blocks.0.att.time_state" in found) == state


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize(
    "batches, chunks",
    [
        ([packed(TEXTS, COUNT)], None),
        ([padded(TEXTS[:2], COUNT), padded(TEXTS[2:], COUNT)], None),
        ([packed(TEXTS, COUNT)], ChunkPlan(7)),
        ([packed(TEXTS, COUNT)], ChunkPlan(5, offload=True)),
        ([padded(TEXTS, COUNT)], ChunkPlan(4)),
    ],
    ids=["packed", "two micro-batches", "chunks", "chunks in host memory", "padded chunks"],
)
@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
def test_every_text_has_the_prefix(batches, chunks, grad_cp, version):
    model = with_prefix(version).double()
    expected = state_gradients(model, [padded([text], COUNT) for text in TEXTS])
    model.grad_cp = grad_cp
    found = state_gradients(model, batches, SFT(chunks=chunks))
    assert found.keys() == {"prefix"}
    torch.testing.assert_close(found["prefix"], expected["prefix"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("version", [6, 7])
def test_pairs_have_the_prefix_once(version):
    """Prompts start behind it, answers behind their prompts."""
    pairs = make_batch([Pair(*(torch.arange(1, n).numpy() for n in (6, 4, 7)))])
    model = with_prefix(version)
    found = answer_log_probs(model, pairs)
    start, model.prefix = model.initial_state(1), None
    tokens = torch.cat([torch.arange(1, 6), torch.arange(1, 7)])
    hidden, _ = model(tokens[None, :-1], start)
    scores = model.logits(hidden[0]).log_softmax(-1).gather(-1, tokens[1:, None])[4:, 0]
    torch.testing.assert_close(found, torch.stack([scores[:3].sum(), scores.sum()]))


@pytest.mark.parametrize("version", [6, 7])
def test_the_exported_state_is_the_prefix(version, tmp_path):
    """A file with the state and its token shifts gives every later model the same logits."""
    model, tokens = with_prefix(version), torch.arange(9)[None]
    want = model(tokens)[0]
    write_tensors(tmp_path / "state.pth", state_tensors(model.initial_state(1)))
    model.prefix = None
    without = model(tokens)[0]
    load_state(model, read_tensors(tmp_path / "state.pth"))
    torch.testing.assert_close(model(tokens)[0], want, rtol=1e-6, atol=1e-6)
    both, _ = model(torch.cat([tokens, tokens], dim=1), None, torch.tensor([0, 9, 18]))
    torch.testing.assert_close(both, torch.cat([want, want], dim=1), rtol=1e-5, atol=1e-5)
    for block in model.blocks:
        block.shift_state = None
    assert (want - without).abs().max() > (model(tokens)[0] - want).abs().max() > 1e-3


def test_a_prefix_has_the_rates_of_the_states(tmp_path):
    rule = {"match": "blocks.*", "mode": "lora", "rank": 4, "lr_init": 1e-4, "lr_final": 1e-5}
    rule |= {"state_lr_init": 0.5, "state_lr_final": 0.05, "weight_decay": 0.1}
    (tmp_path / "p.json").write_text(json.dumps({"rules": [rule]}))
    model = small_model()
    plan = apply_profile(model, PeftFlags(layer_profile=str(tmp_path / "p.json")))
    add_prefix(model, 3)
    (prefix,) = (g for g in parameter_groups(model, plan, OptimizerFlags()) if g.name == "prefix")
    assert (prefix.lr_init, prefix.lr_final, prefix.weight_decay) == (0.5, 0.05, 0.0)
    assert list(prefix.names) == ["prefix"]


@pytest.fixture(scope="module", params=[6, 7])
def run(request, tmp_path_factory) -> Path:
    """A state alone, trained on a frozen model for a few steps."""
    folder = tmp_path_factory.mktemp(f"state{request.param}")
    write_tensors(folder / "base.pth", byte_model(request.param).state_dict())
    rows = [{"prompt": f"{n}?", "completion": "yes yes yes"} for n in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.main(words(folder, folder / "out")) == 0
    return folder


def words(folder: Path, output: Path, **more: object) -> list[str]:
    values = {
        "load_model": folder / "base.pth",
        "train_data_file": folder / "data.jsonl",
        "layer_profile": Path(train.__file__).parent / "layerprofile" / "state.json",
        "proj_dir": output,
        "cache_dir": folder / "cache",
        "sft": 1,
        "state": 1,
        "template": "plain",
        "accelerator": "cpu",
        "kernel": "torch",
        "ctx_len": 64,
        "micro_bsz": 2,
        "epoch_steps": 6,
        "num_workers": 0,
    }
    return [word for name, value in (values | more).items() for word in (f"--{name}", str(value))]


def test_the_state_alone_is_saved(run):
    log = read_log(run / "out" / "train_log.jsonl")
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    assert log[0]["lr"] == pytest.approx(1.0)  # of layerprofile/state.json
    for name, kind in (("rwkv-0.pth", "adapter"), ("rwkv-0-state.pth", "state")):
        tensors = read_tensors(run / "out" / name)
        assert tensors.shapes == dict.fromkeys(LAYERS, STATE_LAYOUT)
        assert {tensors[layer].dtype for layer in LAYERS} == {torch.float32}
        assert read_metadata(run / "out" / name)["kind"] == kind
    assert any(tensors[layer].abs().max() > 0.1 for layer in LAYERS)


def test_the_package_rwkv_writes_the_same_text(run):
    """Our model with the tuned state and the package's, greedily, token by token."""
    assert_peer_agrees(run, run / "out" / "rwkv-0-state.pth")


def test_the_package_rwkv_starts_behind_the_prefix(prefixed, run):
    """The same for the state of a prefix, token shifts included."""
    assert_peer_agrees(run, prefixed / "rwkv-0-state.pth")


def assert_peer_agrees(run: Path, state: Path) -> None:
    skip_without_peer()
    prompt = list(b"12?")
    model = load_model(run / "base.pth", backend="torch").requires_grad_(False)
    without, _ = model(torch.tensor([prompt]))
    load_state(model, read_tensors(state))
    hidden, after = model(torch.tensor([prompt]))
    peer = ask_peer(run / "base.pth", prompt, count=16, state=state)
    logits = model.logits(hidden[0])
    torch.testing.assert_close(logits, torch.from_numpy(peer.logits), rtol=1e-3, atol=1e-3)
    assert (logits - model.logits(without[0])).abs().max() > 0.1
    written = []
    for _ in range(16):
        written.append(int(model.logits(hidden[0, -1]).argmax()))
        hidden, after = model(torch.tensor([written[-1:]]), after)
    assert written == peer.written


def test_a_run_goes_on_from_a_saved_state(run, tmp_path):
    """--load_adapter takes the file of a tuned state: its first loss is where the last run was."""
    more = {"load_adapter": run / "out" / "rwkv-0.pth", "val_data_file": run / "data.jsonl"}
    assert train.main(words(run, tmp_path / "on", **more)) == 0
    log = read_log(tmp_path / "on" / "train_log.jsonl")
    first = next(line["val_loss"] for line in log if "val_loss" in line)
    last = [line["loss"] for line in read_log(run / "out" / "train_log.jsonl") if "loss" in line]
    assert first < last[0]


def test_beside_an_adapter(run, tmp_path):
    profile = Path(train.__file__).parent / "layerprofile" / "state-lora.json"
    assert train.main(words(run, tmp_path / "both", layer_profile=profile)) == 0
    both = read_tensors(tmp_path / "both" / "rwkv-0.pth")
    assert {"blocks.0.att.key.lora_A", *LAYERS} <= set(both)
    assert set(read_tensors(tmp_path / "both" / "rwkv-0-state.pth")) == set(LAYERS)


def test_resumed_it_ends_the_same(run, tmp_path):
    output = tmp_path / "resumed"
    assert train.main(words(run, output, epoch_steps=6, epoch_count=1, resume_every=3)) == 0
    want, got = (read_tensors(where / "rwkv-0.pth") for where in (run / "out", output))
    assert all(torch.equal(want[name], got[name]) for name in LAYERS)


@pytest.fixture(scope="module", params=["alone", "beside adapters"])
def prefixed(run, request, tmp_path_factory) -> Path:
    """A prefix trained for a few steps."""
    folder = tmp_path_factory.mktemp("prefix")
    more = {"state": 0, "prefix_tuning": 1, "prefix_token_len": 16, "epoch_steps": 60}
    if request.param == "beside adapters":
        profile = folder / "profile.json"
        rule = {"match": "blocks.*", "mode": "lora", "rank": 4, "dropout": 0.1}
        profile.write_text(json.dumps({"rules": [rule | {"state_lr_init": 0.1}]}))
        more |= {"layer_profile": profile, "lr_init": 1e-3, "lr_final": 1e-3}
    assert train.main(words(run, folder / "whole", **more)) == 0
    return folder / "whole"


def test_a_prefix_resumed_ends_the_same(run, tmp_path, monkeypatch):
    """Stopped after 3 of 6 steps; the embeddings drawn anew at the start do not matter."""
    more = {"state": 0, "prefix_tuning": 1, "prefix_token_len": 4}
    assert train.main(words(run, tmp_path / "whole", **more)) == 0
    told = Saving.on_train_batch_end

    def stop(saving, trainer, lit, *rest):
        if lit.steps_done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        told(saving, trainer, lit, *rest)

    monkeypatch.setattr(Saving, "on_train_batch_end", stop)
    more["epoch_steps"] = 6
    assert train.main(words(run, tmp_path / "parts", **more)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert train.main(words(run, tmp_path / "parts", resume=1, **more)) == 0
    want, got = (read_tensors(tmp_path / name / "rwkv-0.pth") for name in ("whole", "parts"))
    assert torch.equal(want["prefix"], got["prefix"])


def test_a_prefix_is_saved_and_exported(prefixed, run):
    tensors = read_tensors(prefixed / "rwkv-0.pth")
    assert tensors.shapes["prefix"] == (16, 32)
    state = read_tensors(prefixed / "rwkv-0-state.pth")
    shifts = [f"blocks.{n}.shift_state" for n in range(2)]
    assert set(state) == {*LAYERS, *shifts}
    assert {state[name].dtype for name in state} == {torch.float32}
    losses = [line["loss"] for line in read_log(prefixed / "train_log.jsonl") if "loss" in line]
    assert losses[-1] < 0.95 * losses[0]


def test_every_reader_starts_behind_the_prefix(prefixed, run):
    """--adapter reads it from the run's file; --state, beside what else trained, the state."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)

    def logits(*more):
        options = parser.parse_args(
            ["--load_model", str(run / "base.pth"), "--kernel", "torch", *map(str, more)]
        )
        model, _ = open_model(options)
        return model.logits(model(torch.tensor([[1, 2, 3, 4]]))[0])

    whole = logits("--adapter", prefixed / "rwkv-0.pth")
    state = logits("--state", prefixed / "rwkv-0-state.pth")
    both = logits("--adapter", prefixed / "rwkv-0.pth", "--state", prefixed / "rwkv-0-state.pth")
    torch.testing.assert_close(both, whole, rtol=1e-4, atol=1e-4)
    alone = set(read_tensors(prefixed / "rwkv-0.pth")) == {"prefix"}
    assert torch.allclose(state, whole, rtol=1e-4, atol=1e-4) == alone
    assert (logits() - whole).abs().max() > 0.05


def test_a_merge_writes_the_state_beside_the_model(prefixed, run, tmp_path, capsys):
    """Merged model and state give the logits of base and adapter file."""
    names = ("base.pth", prefixed / "rwkv-0.pth", tmp_path / "merged.pth")
    words = zip(("--base", "--adapter", "--output"), names, strict=True)
    words = [
        str(run / word) if word == "base.pth" else str(word) for pair in words for word in pair
    ]
    start = tmp_path / "merged-state.pth"
    start.write_text("mine")
    with pytest.raises(InputError, match=r"merged-state\.pth: is there, and no \.json says"):
        merge.main(words)
    assert not (tmp_path / "merged.pth").exists()
    start.unlink()
    assert merge.main(words) == 0
    assert "merged-state.pth: the state that texts start from" in capsys.readouterr().out
    merged = load_model(tmp_path / "merged.pth", backend="torch")
    load_state(merged, read_tensors(tmp_path / "merged-state.pth"))
    adapted = load_model(run / "base.pth", backend="torch")
    put_adapter(adapted, run / "base.pth", prefixed / "rwkv-0.pth", merged=True)
    tokens = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(merged(tokens)[0], adapted(tokens)[0], rtol=1e-4, atol=1e-4)


def test_a_prefix_of_another_model_is_named(run, tmp_path):
    write_tensors(tmp_path / "other.pth", {"prefix": torch.zeros(3, 64)})
    model = load_model(run / "base.pth", backend="torch")
    with pytest.raises(InputError, match=r"prefix is \[3, 64\], the model's embeddings have 32"):
        load_start(model, read_tensors(tmp_path / "other.pth"))
