"""State tuning: the state that texts start from trains, and every reader takes it up."""

import json
from pathlib import Path

import pytest
import torch
from parity_rwkv import ask_peer, skip_without_peer
from test_infctx import byte_model
from test_sft import packed, padded, small_model, texts

import train
from losses.sft import SFT
from peft.apply import apply_profile
from peft.flags import PeftFlags
from peft.groups import parameter_groups
from peft.tuned_state import add_tuned_state
from rwkv.checkpoint import load_model, read_metadata, read_tensors, write_tensors
from rwkv.ops import wkv6, wkv7
from rwkv.runner import load_state
from rwkv.training.flags import OptimizerFlags
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
    skip_without_peer()
    state, prompt = run / "out" / "rwkv-0-state.pth", list(b"12?")
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
