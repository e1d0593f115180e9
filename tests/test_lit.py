"""What LitModel and StepLog do around a step: clipping, reading numbers, letting go."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from test_sft import COUNT, TEXTS, V, packed, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import train as command
from losses.sft import SFT
from rwkv.checkpoint import write_tensors
from rwkv.config import RWKVConfig, default_ranks
from rwkv.errors import RunError
from rwkv.init import initialize
from rwkv.model import RWKV
from rwkv.ops.packing import text_lengths
from rwkv.training import optimizer
from rwkv.training.flags import OptimizerFlags
from rwkv.training.lit import LitModel
from rwkv.training.schedule import Schedule
from rwkv.training.step_log import RunLog, StepLog, read_log

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item"}


@dataclass
class Group:
    params: list[nn.Parameter]
    lr_init: float = 1e-2
    lr_final: float = 1e-2
    weight_decay: float = 0.0


class Bigram(nn.Module):
    """The smallest language model."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, tokens, state=None, cu_seqlens=None, final_states=None):
        assert cu_seqlens is None or text_lengths(cu_seqlens)
        return self.emb(tokens), state

    def logits(self, hidden):
        return self.head(hidden)


def train(
    folder: Path,
    clip: float | None,
    *,
    log: bool,
    behind: int = 0,
    model: nn.Module | None = None,
    objective: Any = None,
    first: pl.Callback | None = None,
    seen=lambda lit: None,
) -> list[Tensor]:
    """The parameters after three steps."""
    model = small_model() if model is None else model
    where = torch.cat([mask for _, mask in TEXTS]).nonzero().squeeze(1)
    batches = [packed(TEXTS, COUNT)._replace(places=where) for _ in range(3)]
    lit = LitModel(
        model,
        objective or SFT(),
        [Group(list(model.parameters()))],
        OptimizerFlags(),
        strategy="auto",
        loader=lambda rank: torch.utils.data.DataLoader(batches, batch_size=None),
    )

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_) -> None:
            seen(lit)

    steps = StepLog(
        RunLog(folder),
        Schedule("constant", 3, 0),
        every=1,
        step_tokens=51,
        loggers=[],
        behind=behind,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        gradient_clip_val=clip,
        callbacks=[*([first] if first else []), *([steps] if log else []), Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(lit)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("clip", [1e-3, 1e6, None], ids=["always", "never", "off"])
def test_clipping_to_a_known_norm_is_clipping(tmp_path, clip, monkeypatch):
    """With the log, which knows the norm, without it, and as torch clips."""
    want, got = (train(tmp_path, clip, log=log) for log in (False, True))

    def clips(lit, optimizer, gradient_clip_val, gradient_clip_algorithm):
        if gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(lit.parameters(), gradient_clip_val)

    monkeypatch.setattr(LitModel, "configure_gradient_clipping", clips)
    torchs = train(tmp_path, clip, log=True)
    for a, b, c in zip(got, want, torchs, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-7)


def test_clipping_changes_the_step(tmp_path):
    """AdamW's first steps do not know the scale of a gradient, but its epsilon does."""
    some, other = (train(tmp_path, clip, log=True) for clip in (1e-7, None))
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(some, other, strict=True))


def test_gradients_are_gone_after_a_step(tmp_path):
    left = []
    train(tmp_path, 1.0, log=True, seen=lambda lit: left.extend(p.grad for p in lit.parameters()))
    assert left and all(grad is None for grad in left)


def test_a_log_that_stays_behind_says_the_same(tmp_path):
    logs = []
    for behind in (0, 1, 5):
        train(tmp_path / str(behind), 1.0, log=True, behind=behind)
        lines = read_log(tmp_path / str(behind) / "train_log.jsonl")
        logs.append([{k: v for k, v in one.items() if "second" not in k} for one in lines])
    assert [line["step"] for line in logs[0]] == [1, 2, 3]
    assert logs[0] == logs[1] == logs[2]
    assert all(line["grad_norm"] > 0 for line in logs[0])


@pytest.mark.parametrize("behind", [0, 1])
def test_a_loss_that_is_not_finite_is_named_by_its_step(tmp_path, behind):
    steps = 0

    def breaks(model, batch):
        nonlocal steps
        steps += 1
        loss, metrics = SFT()(model, batch)
        return loss * (float("nan") if steps == 2 else 1.0), metrics

    with pytest.raises(RunError, match="step 2: the loss is nan"):
        train(tmp_path, 1.0, log=True, behind=behind, objective=breaks)
    assert steps == 2 + behind


def test_gradients_that_are_not_finite_are_named_and_nothing_is_saved(tmp_path, monkeypatch):
    """A finite loss whose gradient is nan, at the last step: the resume point of before stays."""
    training_step = LitModel.training_step

    def breaks(lit, batch, index):
        some = next(p for p in lit.model.parameters() if p.requires_grad)
        loss = training_step(lit, batch, index)
        return loss + (some * 0).sum().sqrt() if index == 3 else loss

    monkeypatch.setattr(LitModel, "training_step", breaks)
    words = [*write_run(tmp_path), "--proj_dir", str(tmp_path / "run"), "--epoch_steps", "4"]
    words += ["--ctx_len", "64", "--micro_bsz", "1", "--resume_every", "1", "--num_workers", "0"]
    with pytest.raises(RunError, match="step 4: the norm of the gradients is nan; lower --lr_init"):
        command.main([*words, "--accelerator", "cpu"])
    assert [p.name for p in (tmp_path / "run" / "resume").iterdir()] == ["step-3"]
    assert not list((tmp_path / "run").glob("*.pth"))


class NothingRead(TorchDispatchMode):
    """Stops at operators that would wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in READS, f"{name} within a step"
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch):
    """From the move of a batch to what the log sends off: loss, gradient, clipping, optimizer."""

    class Watched(pl.Callback):
        def on_train_batch_start(self, *_) -> None:
            self.mode, self.tolist = NothingRead(), Tensor.tolist
            Tensor.tolist = None
            self.mode.__enter__()

        def on_train_batch_end(self, *_) -> None:
            self.mode.__exit__(None, None, None)
            Tensor.tolist = self.tolist

    def sgd(flags, **_):  # Adam counts its steps on a CPU in tensors
        return lambda groups: torch.optim.SGD(groups, lr=1e-2)

    monkeypatch.setattr(optimizer, "_maker", sgd)
    sent = []
    monkeypatch.setattr(StepLog, "_report", lambda log, trainer: sent.append(log._unread.pop()))
    model = Bigram().bfloat16()
    train(tmp_path, 1e-3, log=True, model=model, first=Watched())
    assert [one.step for one in sent] == [1, 2, 3]


def write_run(folder: Path) -> list[str]:
    """A model, data and a profile that the kernels of a GPU take; the flags of a run."""
    config = RWKVConfig(
        version=7,
        n_layer=2,
        n_embd=128,
        dim_ffn=512,
        vocab_size=256,
        head_size=64,
        ranks=default_ranks(7, 128),
    )
    model = RWKV(config)
    initialize(model, seed=3)
    write_tensors(folder / "base.pth", model.state_dict())
    texts = [{"text": f"{n} and {n + 1} " * (n % 30 + 5)} for n in range(200)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    rule = {"match": "blocks.*", "mode": "lora", "rank": 16, "alpha": 16}
    (folder / "lora.json").write_text(json.dumps({"rules": [rule]}))
    flags = {
        "sft": 1,
        "load_model": folder / "base.pth",
        "train_data_file": folder / "texts.jsonl",
        "tokenizer": "bytes",
        "layer_profile": folder / "lora.json",
        "ctx_len": 512,
        "micro_bsz": 4,
        "epoch_steps": 6,
        "precision": "bf16",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_2"])
def test_a_step_of_train_py_never_waits_for_the_gpu(tmp_path, monkeypatch, strategy):
    """From the fourth step on torch raises where it would wait; the log waits for an event."""
    if strategy != "auto" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    train_step, catch_up, seen = LitModel.training_step, StepLog.catch_up, []

    def watched(lit, batch, index):
        seen.append(index)
        if index >= 3:
            torch.cuda.set_sync_debug_mode("error")
        return train_step(lit, batch, index)

    def unwatched(log, trainer):
        torch.cuda.set_sync_debug_mode("default")
        catch_up(log, trainer)

    monkeypatch.setattr(LitModel, "training_step", watched)
    monkeypatch.setattr(StepLog, "catch_up", unwatched)
    words = [*write_run(tmp_path), "--proj_dir", str(tmp_path / "run"), "--strategy", strategy]
    try:
        assert command.main(words) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 6
    assert len(read_log(tmp_path / "run" / "train_log.jsonl")) == 6
