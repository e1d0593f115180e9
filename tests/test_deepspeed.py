"""DeepSpeed, on a CPU: each stage trains, saves, evaluates and resumes like --strategy auto."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_training import save_model

from rwkv.checkpoint import read_tensors, write_tensors
from rwkv.training.step_log import read_log

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
STEPS = 3
STAGES = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
SCATTERED = ["deepspeed_stage_3", "deepspeed_stage_3_offload"]
MODES = {
    "lora": {"layer_profile": "lora.json"},
    "full": {},
    "lora in chunks": {"layer_profile": "lora.json", "infctx": 1, "chunk_ctx": 48},
    "full in chunks": {"infctx": 1, "chunk_ctx": 48, "chunk_offload": 1},
    "frozen but for the head": {"layer_profile": "head.json"},
    "version 6": {"load_model": "base6.pth", "layer_profile": "lora.json"},
    "no packing": {"packing": 0, "micro_bsz": 2, "layer_profile": "lora.json"},
    "in host memory": {"grad_cp_offload": 1, "layer_profile": "lora.json"},
    "no recomputation": {"grad_cp": 0, "layer_profile": "lora.json"},
}
PROFILES = {
    "dora": [{"match": "blocks.*", "mode": "dora", "rank": 4, "alpha": 8}],
    "lora": [{"match": "blocks.*", "mode": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}],
    "bare": [
        {"match": "*", "mode": "freeze"},
        {"match": "blocks.*.key", "mode": "lora", "rank": 4, "alpha": 8},
    ],
    "head": [{"match": "*", "mode": "freeze"}, {"match": "head", "mode": "full"}],
}


class Run(NamedTuple):
    """A finished run: what it wrote, and what deepspeed_on_cpu.py says of it."""

    folder: Path
    report: dict

    @property
    def steps(self) -> list[dict]:
        return [line for line in read_log(self.folder / "train_log.jsonl") if "loss" in line]

    @property
    def held_out(self) -> list[float]:
        lines = read_log(self.folder / "train_log.jsonl")
        return [line["val_loss"] for line in lines if "val_loss" in line]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: t.clone() for name, t in read_tensors(self.folder / "rwkv-0.pth").items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    save_model(folder / "base.pth")
    save_model(folder / "base6.pth", 6)
    draw = torch.Generator().manual_seed(0)
    noisy = {  # every gradient counts: a new model has pairs of matrices of which one is 0
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in read_tensors(folder / "base.pth").items()
    }
    write_tensors(folder / "noisy.pth", noisy)
    rows = [
        {"prompt": f"Say {n} {'again ' * (n % 4)}", "completion": f"{n} " * (n % 5 + 1)}
        for n in range(40)
    ]
    for name, part in (("train.jsonl", rows[:36]), ("val.jsonl", rows[36:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "prompts.txt").write_text("Say 7\n")
    for name, rules in PROFILES.items():
        (folder / f"{name}.json").write_text(json.dumps({"rules": rules}))
    return folder


def start(folder: Path, runs: dict[str, dict]) -> dict[str, Run]:
    """Run train.py in one process, with flags for each run's name; each must end as asked."""
    listed = []
    for name, more in runs.items():
        values = {
            "load_model": "base.pth",
            "train_data_file": "train.jsonl",
            "proj_dir": folder / name,
            "cache_dir": folder / "cache",
            "accelerator": "cpu",
            "sft": 1,
            "ctx_len": 128,
            "accumulate_grad_batches": 2,
            "epoch_steps": 2 * STEPS,
            "lr_init": 1e-2,
            "lr_final": 1e-3,
            "num_workers": 0,
        } | more
        stop_at, sgd = values.pop("stop_at", None), values.pop("sgd", False)
        words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        listed.append({"words": words, "stop_at": stop_at, "sgd": sgd})
    path = folder / f"{next(iter(runs))}.runs"
    path.write_text(json.dumps(listed))
    command = [sys.executable, str(ROOT / "tests" / "deepspeed_on_cpu.py"), str(path)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("report ")]
    reports = [json.loads(line.removeprefix("report ")) for line in lines]
    for (name, more), report in zip(runs.items(), reports, strict=True):
        assert report["status"] == (143 if "stop_at" in more else 0), (name, done.stderr)
    return {name: Run(folder / name, report) for name, report in zip(runs, reports, strict=True)}


def assert_same(got: Run, want: Run) -> None:
    """Losses, gradient norms and held-out losses to 1e-5, every saved tensor to 1e-5."""
    for number in ("loss", "grad_norm", "lr"):
        assert [line[number] for line in got.steps] == pytest.approx(
            [line[number] for line in want.steps], rel=1e-5
        ), number
    assert got.held_out == pytest.approx(want.held_out, rel=1e-5)
    assert_same_tensors(got.tensors(), want.tensors())


def assert_same_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_every_stage_trains_like_auto(folder, mode):
    strategies = ["auto", *STAGES, "deepspeed_stage_3_offload"]
    if mode not in list(MODES)[:3]:
        strategies = ["auto", "deepspeed_stage_3"]
    held_out = {"val_data_file": "val.jsonl", "val_prompts": "prompts.txt", "val_tokens": 5}
    more = MODES[mode] | (held_out if "lora" in mode else {})
    runs = start(folder, {f"{mode} {s}": more | {"strategy": s} for s in strategies})
    want, *others = runs.values()
    assert len(want.steps) == STEPS
    for run in others:
        assert_same(run, want)
        assert run.report.get("left", 0) == 0


def test_magnitudes_of_dora_get_the_dtype_of_the_rest(folder):
    """They are float32 under `auto`; DeepSpeed trains in one dtype."""
    more = {"layer_profile": "dora.json", "precision": "bf16"}
    runs = start(folder, {f"dora {s}": more | {"strategy": s} for s in ("auto", *STAGES[1:])})
    want, *others = runs.values()
    for run in others:
        losses = ([line["loss"] for line in one.steps] for one in (run, want))
        assert next(losses) == pytest.approx(next(losses), rel=5e-3)
        assert {tensor.dtype for tensor in run.tensors().values()} == {torch.bfloat16}
    found = {name.endswith("lora_M"): t.dtype for name, t in want.tensors().items()}
    assert found == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("mode", ["full", "lora", "full in chunks", "lora in chunks"])
def test_scattered_gradients_are_those_of_auto(folder, mode):
    """Steps of plain gradient descent without clipping: each tensor moves by its gradient.

    A rate of 0.2 moves the norms, which begin at 1, by more than 10,000 times what rounds there.
    """
    sgd = {"lr_init": 0.2, "lr_schedule": "constant", "gradient_clip_val": 0, "sgd": True}
    more = MODES[mode] | sgd | {"load_model": "noisy.pth"}
    runs = start(
        folder,
        {f"{mode} sgd {s}": more | {"strategy": s} for s in ("auto", SCATTERED[0])},
    )
    want, got = (run.tensors() for run in runs.values())
    before = read_tensors(folder / "noisy.pth")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        first = before[name] if name in before else torch.zeros_like(tensor)
        moved, expected = got[name] - first, tensor - first
        assert expected.norm() > 0, name
        assert (moved - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("chunks", [{}, {"infctx": 1, "chunk_ctx": 48}], ids=["whole", "chunks"])
def test_frozen_weights_are_scattered_again_behind_a_recomputation(folder, chunks):
    """At no time is more gathered than one block and vectors; no matrix besides."""
    name = "peak in chunks" if chunks else "peak"
    more = {"layer_profile": "bare.json", "strategy": "deepspeed_stage_3"} | chunks
    report = start(folder, {name: more})[name].report
    assert report["left"] == 0
    assert report["block"] <= report["peak"] < report["block"] + 32 * 32


@pytest.mark.parametrize("strategy", STAGES)
def test_a_stopped_run_resumes_as_if_it_had_not(folder, strategy):
    more = {"layer_profile": "lora.json", "strategy": strategy, "epoch_steps": 10}
    cut = more | {"proj_dir": folder / f"cut {strategy}"}
    runs = start(
        folder,
        {
            f"whole {strategy}": more,
            f"cut {strategy}": cut | {"stop_at": 2},
            f"resumed {strategy}": cut | {"resume": 1},
        },
    )
    whole = runs[f"whole {strategy}"]
    resumed = Run(folder / f"cut {strategy}", {})
    assert len(whole.steps) == 5
    assert_same(resumed, whole)


@pytest.mark.parametrize("profile", [{"layer_profile": "bare.json"}, {}], ids=["lora", "full"])
def test_a_run_goes_on_under_another_strategy_and_number_of_ranks(folder, profile):
    """One process, two under stage 3, one under stage 1, two under stage 2; 2 steps each."""
    kind = "lora" if profile else "full"
    one = profile | {"epoch_steps": 16}
    two = one | {"devices": 2, "accumulate_grad_batches": 1, "epoch_steps": 8}
    whole = start(folder, {f"changes {kind} whole": one})[f"changes {kind} whole"]
    moving = {"resume": 1, "proj_dir": folder / f"changes {kind}"}
    for name, more in {
        "auto": one | {"stop_at": 2},
        "3": two | {"strategy": "deepspeed_stage_3", "stop_at": 4},
        "1": one | {"strategy": "deepspeed_stage_1", "stop_at": 6},
        "2": two | {"strategy": "deepspeed_stage_2"},
    }.items():
        start(folder, {f"changes {kind} {name}": more | moving})
    moved = Run(folder / f"changes {kind}", {})
    assert len(moved.steps) == 8
    assert_same(moved, whole)


@pytest.mark.parametrize("mode", ["lora", "full", "chunks"])
def test_two_ranks_give_what_one_gives(folder, mode):
    """Rows of different lengths and counts of scored tokens: both ranks run the same modules."""
    more = {
        "lora": {"layer_profile": "bare.json", "packing": 0},
        "full": {},
        "chunks": {"layer_profile": "bare.json", "infctx": 1, "chunk_ctx": 16, "packing": 0},
    }[mode]
    one = {"accumulate_grad_batches": 4, "epoch_steps": 4 * STEPS}
    two = {"devices": 2, "strategy": "deepspeed_stage_3", "val_data_file": "val.jsonl"}
    want = start(folder, {f"{mode} one": more | one | {"val_data_file": "val.jsonl"}})
    got = start(folder, {f"{mode} two": more | two})
    assert_same(got[f"{mode} two"], want[f"{mode} one"])
