"""Training from the command line: files written, resuming, stopping, several processes."""

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import train
from data.store_cache import StoreSettings, open_store
from rwkv.checkpoint import load_model, read_metadata, read_tensors, write_tensors
from rwkv.config import RWKVConfig, default_ranks
from rwkv.errors import InputError, RunError
from rwkv.init import initialize
from rwkv.model import RWKV
from rwkv.tokenizer import load_tokenizer
from rwkv.training import resume, stopping
from rwkv.training.evaluation import Evaluation
from rwkv.training.lit import LitModel
from rwkv.training.step_log import read_log
from rwkv.training.stopping import SIGNALS

ROOT = Path(__file__).parent.parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: the same order of sums
STEPS = 8
# dropout, accumulation and 8 bytes of difference in length: whatever a resume could get wrong
PROFILE = {
    "rules": [
        {"match": "blocks.*", "mode": "lora", "rank": 4, "alpha": 8, "dropout": 0.2},
    ]
}


def save_model(path: Path, version: int = 7) -> Path:
    config = RWKVConfig(
        version=version,
        n_layer=2,
        n_embd=32,
        dim_ffn=64,
        vocab_size=256,
        head_size=16,
        ranks=default_ranks(version, 32),
    )
    model = RWKV(config)
    initialize(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("output.weight") or name.endswith("ffn.value.weight"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    write_tensors(path, model.state_dict())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, data and a profile that every test here shares."""
    folder = tmp_path_factory.mktemp("training")
    save_model(folder / "base.pth")
    rows = [
        {"prompt": f"Say {n} {'again ' * (n % 4)}", "completion": f"{n} " * (n % 5 + 1)}
        for n in range(60)
    ]
    for name, part in (("train.jsonl", rows[:50]), ("val.jsonl", rows[50:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    return folder


def flags(folder: Path, output: Path, **more: object) -> list[str]:
    values = {
        "load_model": folder / "base.pth",
        "train_data_file": folder / "train.jsonl",
        "layer_profile": folder / "profile.json",
        "proj_dir": output,
        "cache_dir": folder / "cache",
        "accelerator": "cpu",
        "sft": 1,
        "ctx_len": 128,
        "accumulate_grad_batches": 2,
        "epoch_steps": STEPS,
        "epoch_count": 2,
        "lr_init": 1e-2,
        "lr_final": 1e-3,
        "warmup_steps": 2,
        "num_workers": 0,
    }
    return [word for key, value in (values | more).items() for word in (f"--{key}", str(value))]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in read_tensors(path).items()}


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """The run that nothing interrupts."""
    output = folder / "whole"
    assert train.main(flags(folder, output, val_data_file=folder / "val.jsonl")) == 0
    return output


def test_a_run_writes_what_it_promises(whole):
    assert {p.name for p in whole.iterdir()} == {
        "rwkv-0.pth",
        "rwkv-0.json",
        "rwkv-1.pth",
        "rwkv-1.json",
        "train_log.jsonl",
        "loss.png",
        "resume",
    }
    metadata = read_metadata(whole / "rwkv-1.pth")
    assert (metadata["kind"], metadata["step"], metadata["epoch"]) == ("adapter", STEPS, 1)
    assert "blocks.0.att.key.lora_A" in read_tensors(whole / "rwkv-1.pth")


def test_the_log_has_an_object_a_step(whole):
    lines = read_log(whole / "train_log.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second"} <= steps[0].keys()
    held_out = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in held_out] == [0, STEPS // 2, STEPS]
    assert held_out[-1]["val_loss"] < held_out[0]["val_loss"]


def test_the_schedule_is_followed(whole):
    """Warm-up from 0.2 in 2 steps, then an exponential from 1e-2 to 1e-3."""
    rates = [line["lr"] for line in read_log(whole / "train_log.jsonl") if "loss" in line]
    factor = 2.0  # the decay's offset learns at twice the rate, and the log holds the largest
    assert rates[0] == pytest.approx(factor * 0.2e-2)
    assert rates[2] == pytest.approx(factor * 1e-2)
    assert rates[-1] == pytest.approx(factor * 1e-3)


def test_killed_at_any_moment_it_resumes_bit_for_bit(folder, whole, tmp_path):
    """kill -9 a real process again and again; the last weights are the uninterrupted run's."""
    output, kills = tmp_path / "killed", 0
    words = flags(folder, output, resume=1, resume_every=1, val_data_file=folder / "val.jsonl")
    command = [sys.executable, "train.py", *words]
    deadlines = [3, 4, 6]  # steps in the log at which the process is shot
    while True:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=ONE_THREAD,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        until = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < until:
            done = sum("loss" in line for line in read_log(output / "train_log.jsonl"))
            if kills < len(deadlines) and done >= deadlines[kills]:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
    assert kills == len(deadlines)
    want, got = tensors(whole / "rwkv-1.pth"), tensors(output / "rwkv-1.pth")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    losses = [
        [line["loss"] for line in read_log(run / "train_log.jsonl") if "loss" in line]
        for run in (whole, output)
    ]
    assert losses[0] == losses[1]
    assert not list(output.rglob("*.part"))


@pytest.mark.parametrize(
    "more, named",
    [
        ({"smoothing": 0.1}, "smoothing = 0.0, this run has 0.1"),
        ({"optim": "lion"}, "optim = "),
        ({"lr_init": 5e-3}, "lr_init = 0.01, this run has 0.005"),
        ({"rslora": 1}, "rslora = False"),
        ({"random_mode": 0}, "random_mode = 1, this run has 0"),
        (
            {"infctx": 1, "chunk_grad": "truncated", "chunk_ctx": 48},
            "gradient = of the whole text, this run has cut after 48 tokens",
        ),
        ({"precision": "bf16"}, "precision = float32"),
        ({"quant": 1, "quant_mode": "int8"}, r"blocks.0.att.\w+ = .*quant none.*quant int8"),
    ],
    ids=str,
)
def test_a_run_goes_on_only_as_it_began(folder, whole, more, named):
    words = flags(folder, whole, resume=1, **more)
    with pytest.raises(InputError, match=rf"--resume: .*step-\d+ was made with {named}"):
        train.main(words)


def test_a_run_without_its_first_resume_point_begins_anew(folder, tmp_path, monkeypatch):
    """Ended between the first model and the resume point, as by a kill or a full disk."""
    words = flags(folder, tmp_path / "out", epoch_steps=4, resume=1)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(resume, "save", Mock(side_effect=InterruptedError))
        train.main(words)
    model = tensors(tmp_path / "out" / "rwkv-0.pth")
    with pytest.raises(InputError, match="holds rwkv-0.pth, .*; add --resume 1 to begin that run"):
        train.main(words[:-2])
    assert train.main(words) == 0
    again = tensors(tmp_path / "out" / "rwkv-0.pth")
    assert all(torch.equal(model[name], again[name]) for name in model)
    assert (tmp_path / "out" / "resume" / "step-4").is_dir()


def test_a_run_goes_on_with_the_pieces_it_had(folder, tmp_path):
    """--overlong counts where it changes something: these are dialogues, which auto cuts."""
    words = flags(folder, tmp_path / "out", ctx_len=36, epoch_steps=2, epoch_count=1, resume=1)
    assert train.main(words) == 0
    assert train.main([*words, "--overlong", "cut"]) == 0
    with pytest.raises(InputError, match="pieces = records 50, cut .*, this run has records 50, d"):
        train.main([*words, "--overlong", "drop"])


def test_the_settings_of_a_resume_point_are_read_without_its_tensors(tmp_path):
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    torch.save({"run": {"rows": 3}, "trained": torch.zeros(10**6)}, tmp_path / resume.FILE)
    before = bytes_read()
    assert resume.read_run(tmp_path) == {"rows": 3}
    assert bytes_read() - before < 10**6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves(folder, whole, tmp_path, number):
    """All processes of its group are, as by a terminal or `timeout`: those of batches too."""
    output = tmp_path / "stopped"
    words = flags(folder, output, resume=1, num_workers=1)
    process = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=ONE_THREAD,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not read_log(output / "train_log.jsonl"):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + number, errors
    assert "go on with the same flags and --resume 1" in errors
    assert list((output / "resume").glob("step-*"))
    assert train.main(words) == 0
    want, got = tensors(whole / "rwkv-1.pth"), tensors(output / "rwkv-1.pth")
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.fixture
def terms():
    """The SIGTERMs that take what is this test's usual course."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_a_run_leaves_signals_as_they_were_and_nothing_behind(folder, tmp_path, monkeypatch, terms):
    made, init = [], LitModel.__init__

    def remember(lit, *args, **options):
        init(lit, *args, **options)
        made.append(weakref.ref(lit))

    monkeypatch.setattr(LitModel, "__init__", remember)
    before = [signal.getsignal(number) for number in SIGNALS]
    assert train.main(flags(folder, tmp_path / "out", epoch_steps=2, epoch_count=1)) == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before
    gc.collect()
    assert [one() for one in made] == [None]


def test_asked_while_it_evaluates_step_0_it_saves_the_first_step(
    folder, tmp_path, monkeypatch, terms, capsys
):
    evaluate = Evaluation.evaluate

    def interrupted(evaluation, trainer, lit):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(evaluation, trainer, lit)

    monkeypatch.setattr(Evaluation, "evaluate", interrupted)
    words = flags(folder, tmp_path / "out", val_data_file=folder / "val.jsonl")
    assert train.main(words) == 128 + signal.SIGTERM
    assert f"stopped at step 1 of {STEPS}" in capsys.readouterr().err
    assert (tmp_path / "out" / "resume" / "step-1").is_dir() and not terms


def test_a_resumed_run_measures_each_step_once(folder, tmp_path, monkeypatch):
    """Stopped in the middle of a run whose steps are two micro-batches each."""
    training_step = LitModel.training_step

    def interrupted(lit, batch, index):
        if lit.steps_done == 0:
            signal.raise_signal(signal.SIGTERM)
        return training_step(lit, batch, index)

    monkeypatch.setattr(LitModel, "training_step", interrupted)
    more = {"val_data_file": folder / "val.jsonl", "val_every": 1, "epoch_steps": 6, "resume": 1}
    words = flags(folder, tmp_path / "out", epoch_count=1, **more)
    assert train.main(words) == 128 + signal.SIGTERM
    assert train.main(words) == 0
    lines = read_log(tmp_path / "out" / "train_log.jsonl")
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 1, 2, 3]


def test_a_second_signal_takes_its_usual_course(folder, tmp_path, monkeypatch, terms):
    """SIGTERM goes to the handler of before, Ctrl-C ends the run at once."""
    training_step, number = LitModel.training_step, signal.SIGTERM

    def interrupted(lit, batch, index):
        signal.raise_signal(number)
        signal.raise_signal(number)
        return training_step(lit, batch, index)

    monkeypatch.setattr(LitModel, "training_step", interrupted)
    monkeypatch.setattr(stopping, "ECHO", 0.0)
    assert train.main(flags(folder, tmp_path / "one")) == 128 + number
    assert terms[0] == number and (tmp_path / "one" / "resume" / "step-1").is_dir()
    number = signal.SIGINT
    before = signal.signal(number, signal.default_int_handler)  # pytest-xdist's ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(flags(folder, tmp_path / "two"))
    finally:
        signal.signal(number, before)


def test_a_signal_within_the_last_step_finds_the_run_done(folder, tmp_path, monkeypatch, capsys):
    training_step = LitModel.training_step

    def interrupted(lit, batch, index):
        if index == 1:
            signal.raise_signal(signal.SIGTERM)
        return training_step(lit, batch, index)

    monkeypatch.setattr(LitModel, "training_step", interrupted)
    words = flags(folder, tmp_path / "out", epoch_steps=2, epoch_count=1)
    assert train.main(words) == 0
    assert "done: 1 steps" in capsys.readouterr().err


# four rows a step, on one process and on two; all weights train
ONE = {"devices": 1, "accumulate_grad_batches": 4, "epoch_steps": 4 * STEPS, "epoch_count": 1}
TWO = ONE | {"devices": 2, "accumulate_grad_batches": 2, "epoch_steps": 2 * STEPS}
TWO |= {"strategy": "ddp"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def full(folder: Path, output: Path, **more: object) -> list[str]:
    """Flags of a run that trains everything."""
    words = flags(folder, output, **more)
    del words[words.index("--layer_profile") : words.index("--layer_profile") + 2]
    return words


def start(words: list[str], *launcher: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *words],
        cwd=ROOT,
        env=ONE_THREAD,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in read_log(output / "train_log.jsonl") if "loss" in line]


def until_step(process: subprocess.Popen, output: Path, step: int) -> None:
    until = time.monotonic() + 200
    while len(losses_of(output)) < step and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def assert_same_run(got: Path, want: Path) -> None:
    """Equal losses to 1e-5, equal files, and weights as near as sums in another order allow."""
    assert losses_of(got) == pytest.approx(losses_of(want), rel=1e-5)
    assert {p.name for p in got.iterdir()} == {p.name for p in want.iterdir()}
    tensors_got = tensors(got / "rwkv-0.pth")
    for name, tensor in tensors(want / "rwkv-0.pth").items():
        torch.testing.assert_close(tensors_got[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """One process, four rows a step."""
    output = folder / "alone"
    assert train.main(full(folder, output, **ONE)) == 0
    return output


def test_two_processes_give_what_one_gives(folder, alone, tmp_path):
    """The same rows a step on one rank and on two, started by train.py itself."""
    process = start(full(folder, tmp_path / "two", **TWO))
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    assert_same_run(tmp_path / "two", alone)


def test_torchrun_reads_every_row_once_in_an_epoch(folder, tmp_path):
    """A pass over the data; its last step has fewer rows than the ranks could take. The processes
    do it twice, as in rounds of --iterate."""
    words = {"epoch_steps": 0, "lr_init": 1e-3}
    assert train.main(full(folder, tmp_path / "one", **ONE | words)) == 0
    runs = [
        {"name": name, "words": full(folder, tmp_path / name, **TWO | words)}
        for name in ("two", "again")
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [
            sys.executable,
            *TORCHRUN,
            "tests/several_runs.py",
            tmp_path / "runs.json",
            tmp_path / "r",
        ],
        cwd=ROOT,
        env=ONE_THREAD | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    for name in ("two", "again"):
        assert_same_run(tmp_path / name, tmp_path / "one")
    counts = [
        [line["tokens"] for line in read_log(tmp_path / name / "train_log.jsonl")]
        for name in ("one", "two")
    ]
    assert counts[0] == counts[1]
    cache = StoreSettings(cache_dir=str(folder / "cache"))
    records = open_store(folder / "train.jsonl", cache, load_tokenizer("bytes", 256))
    tokens = sum(len(records.record(i)[0]) - 1 for i in range(len(records)))
    assert sum(counts[1]) == tokens + 1  # 19 rows in 20 places; the empty one is a token not scored


def test_two_processes_give_what_one_gives_in_every_mode(folder, tmp_path):
    """Chunks, adapters over stored weights, and pairs: the losses of all steps, in float32."""
    rule = {"match": "blocks.*", "mode": "lora", "rank": 4, "quant": "nf4", "train_small": False}
    (tmp_path / "nf4.json").write_text(json.dumps({"rules": [rule]}))
    pairs = [
        {
            "prompt": f"Is {n} {'very ' * (n % 4)}even?",
            "chosen": "yes " * (n % 3 + 1),
            "rejected": "no",
        }
        for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    chunks, stored = {"infctx": 1, "chunk_ctx": 48}, {"layer_profile": tmp_path / "nf4.json"}
    pair_flags = {"sft": 0, "dpo": 1, "rlhf_train_file": tmp_path / "pairs.jsonl"}
    modes = {"chunks": chunks, "stored": stored, "stored in chunks": chunks | stored}
    modes |= {"dpo": stored | pair_flags}
    runs = []
    for name, more in modes.items():
        make = flags if "layer_profile" in more else full
        assert train.main(make(folder, tmp_path / "one" / name, **ONE | more)) == 0
        words = make(folder, tmp_path / "two" / name, **TWO | more)
        runs.append({"name": name, "words": words})
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, *TORCHRUN, "tests/several_runs.py", tmp_path / "runs.json"]
    environment = ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, tmp_path / "r"], cwd=ROOT, env=environment, capture_output=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    for name in modes:
        want = losses_of(tmp_path / "one" / name)
        assert len(want) == STEPS
        assert losses_of(tmp_path / "two" / name) == pytest.approx(want, rel=1e-5), name


def test_a_rank_that_dies_ends_the_run_and_the_run_goes_on_on_one_process(folder, alone, tmp_path):
    output = tmp_path / "dead"
    process = start(full(folder, output, **TWO, resume_every=2, resume=1))
    until_step(process, output, 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: rank 1: its process was killed (SIGKILL), and the others were")
    assert "with the same flags and --resume 1" in last
    assert len(losses_of(output)) < STEPS
    assert train.main(full(folder, output, **ONE, resume=1)) == 0
    assert_same_run(output, alone)


def test_a_rank_asked_to_stop_stops_the_run_as_one_process_does(folder, tmp_path):
    output = tmp_path / "asked"
    process = start(full(folder, output, **TWO | {"epoch_steps": 800}))
    until_step(process, output, 2)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert " of 400; go on with the same flags and --resume 1" in errors
    assert list((output / "resume").glob("step-*"))


def test_ranks_leave_when_the_first_is_killed(folder, tmp_path):
    output = tmp_path / "orphans"
    process = start(full(folder, output, **TWO))
    until_step(process, output, 2)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    process.kill()
    _, errors = process.communicate(timeout=60)
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: rank 0: its process was killed, and the others were stopped; ")
    until = time.monotonic() + 30
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only the remains of one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_one_process_began_goes_on_on_two(folder, alone, tmp_path):
    output = tmp_path / "grown"
    process = start(full(folder, output, **ONE, resume=1))
    until_step(process, output, 1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    process = start(full(folder, output, **TWO, resume=1))
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    assert_same_run(output, alone)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_training_from_scratch_makes_a_model_file(folder, tmp_path, version):
    words = flags(folder, tmp_path / "new", my_testing=version, n_layer=2, n_embd=64)
    for gone in ("--load_model", "--layer_profile"):
        del words[words.index(gone) : words.index(gone) + 2]
    assert train.main([*words, "--vocab_size", "256", "--head_size_a", "32"]) == 0
    model = load_model(tmp_path / "new" / "rwkv-1.pth")
    assert (model.config.n_layer, model.config.n_embd, model.config.head_size) == (2, 64, 32)


def test_optimizers_and_schedules_run(folder, tmp_path):
    for optim, schedule in (("AdamW8bit", "cosine"), ("lion", "wsd"), ("adamw", "linear")):
        output = tmp_path / optim
        words = flags(folder, output, optim=optim, lr_schedule=schedule, precision="bf16")
        assert train.main(words) == 0
        losses = [line["loss"] for line in read_log(output / "train_log.jsonl")]
        assert losses[-1] < losses[0]


def test_chunks_train_as_whole_rows_do(folder, whole, tmp_path):
    assert train.main(flags(folder, tmp_path / "c", infctx=1, chunk_ctx=48)) == 0
    want = [line["loss"] for line in read_log(whole / "train_log.jsonl") if "loss" in line]
    got = [line["loss"] for line in read_log(tmp_path / "c" / "train_log.jsonl")]
    assert got[0] == pytest.approx(want[0], rel=0.05)  # dropout draws differ


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    assert train.main(flags(folder, tmp_path / "dry", dry_run=1)) == 0
    assert not (tmp_path / "dry").exists()
    shown = capsys.readouterr().err
    assert "RWKV-7 L2-D32" in shown and "lora" in shown and "8 steps" in shown


def test_a_logger_without_its_package(folder, tmp_path, monkeypatch, capsys):
    """TensorBoard's is asked for; a run goes on without Weights & Biases, and says so."""
    found = importlib.util.find_spec
    absent = {"tensorboard", "tensorboardX", "wandb"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else found(n))
    words = flags(folder, tmp_path / "out", epoch_steps=2, epoch_count=1)
    with pytest.raises(RunError, match="needs the package tensorboard; pip install"):
        train.main([*words, "--tensorboard", "1"])
    assert train.main([*words, "--wandb", "mine"]) == 0
    assert "--wandb mine: wandb is not installed; logging goes on" in capsys.readouterr().err


def test_config_file_gives_flags(folder, tmp_path, capsys):
    words = flags(folder, tmp_path / "dry", dry_run=1)
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    text = "".join(f"{name[2:]}: {value}\n" for name, value in pairs.items())
    (tmp_path / "run.yaml").write_text(text)
    assert train.main(["--config", str(tmp_path / "run.yaml"), "--ctx_len", "64"]) == 0
    assert "of 64 tokens" in capsys.readouterr().err
