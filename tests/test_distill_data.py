"""Teacher's scores on disk: exact, small, resumable, and read from RWKV-LM-RLHF's files."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_infctx import byte_model

import train
from data import make_teacher
from data.batch_plan import BatchPlan
from data.records import DataError
from data.teacher_store import Wanted, open_teacher
from peft import quantize
from rwkv.checkpoint import load_model, read_tensors, write_tensors
from rwkv.errors import InputError, RunError
from rwkv.tokenizer import load_tokenizer
from rwkv.training.step_log import read_log

ROOT = Path(__file__).parent.parent
BYTES = load_tokenizer("bytes", 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, a data set, and the teacher's scores in several shards."""
    folder = tmp_path_factory.mktemp("teacher")
    sure = byte_model(7).state_dict()
    sure["head.weight"] = 8 * sure["head.weight"]
    write_tensors(folder / "teacher.pth", sure)
    small = ["--load_model", str(folder / "teacher.pth"), "--output", str(folder / "small.pth")]
    assert quantize.main([*small, "--quant_mode", "int8"]) == 0
    write_tensors(folder / "student.pth", byte_model(6).state_dict())
    rows = [
        {"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(n)))}
        for n in range(1, 21)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make_teacher.main(command(folder, folder / "scores")) == 0
    return folder


def command(folder: Path, output: Path, **more: object) -> list[str]:
    values = {
        "load_model": folder / "teacher.pth",
        "data": folder / "data.jsonl",
        "output": output,
        "top_k": 8,
        "shard_tokens": 300,
        "cache_dir": folder / "cache",
        "kernel": "torch",
    }
    return [word for name, value in (values | more).items() for word in (f"--{name}", str(value))]


def opened(folder: Path, path: object, **wanted: object):
    values = {"top_k": 100, "temperature": 2.0, "normalized": True} | wanted
    return open_teacher(str(path), str(folder / "cache"), BYTES, Wanted(**values))


def test_scores_are_the_teachers(folder):
    """Log-probabilities and log-sum-exp of each record read alone, to what float16 holds."""
    store = opened(folder, folder / "scores")
    assert len(store.folders) > 2 and store.k == 8
    teacher = load_model(folder / "teacher.pth", backend="torch")
    for number in (0, 7, len(store) - 1):
        tokens, _ = store.record(number)
        with torch.no_grad():
            hidden, _ = teacher(torch.from_numpy(tokens.astype(np.int64))[None])
            log_probs = torch.log_softmax(teacher.logits(hidden[0]), dim=-1)
        ids, values, lse = store.scores(number, 0, len(tokens))
        want, order = log_probs.topk(8)
        assert (ids == order.numpy()).mean() > 0.99  # ties in float32 may part
        np.testing.assert_allclose(values, want.numpy(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(lse, torch.logsumexp(log_probs / 2, -1).numpy(), rtol=1e-5)


def test_a_token_takes_at_most_210_bytes_at_50(folder, tmp_path):
    assert make_teacher.main(command(folder, tmp_path / "s", top_k=50, shard_tokens=10**6)) == 0
    shard = tmp_path / "s" / "shard-00000"
    tokens = json.loads((shard / "meta.json").read_text())["tokens"]
    by_token = ("tokens.npy", "mask.npy", "ids.npy", "values.npy", "lse-2.npy")
    size = sum((shard / name).stat().st_size - 128 for name in by_token)  # 128: numpy's header
    assert size == 207 * tokens


def test_batches_bring_the_scores_of_their_inputs(folder):
    store = opened(folder, folder / "scores")
    for packing in (True, False):
        plan = BatchPlan(store, ctx_len=64, micro_bsz=3, packing=packing, shuffle=False)
        batch = plan.micro_batch(0, 0)
        assert batch.ids.shape == (*batch.inputs.shape, 8)
        assert torch.equal(batch.places, batch.mask.flatten().nonzero().squeeze(1))
        rows = plan.rows(0)
        number = int(plan.pieces.record[rows[0][0]])
        n = int(plan.pieces.sizes[rows[0][0]])
        ids, values, lse = store.scores(number, 0, n)
        assert np.array_equal(batch.ids[0, :n].numpy().view(np.uint16), ids)
        assert np.array_equal(batch.values[0, :n].numpy().view(np.float16), values)
        assert np.array_equal(batch.lse[0, :n].numpy().view(np.float32), lse)


def test_fewer_scores_are_the_likeliest(folder):
    few, all_ = opened(folder, folder / "scores", top_k=3), opened(folder, folder / "scores")
    assert few.k == 3
    assert np.array_equal(few.scores(2, 0, 5)[0], all_.scores(2, 0, 5)[0][:, :3])
    assert few.fingerprint != all_.fingerprint


def test_killed_it_goes_on_and_ends_the_same(folder, tmp_path):
    output = tmp_path / "scores"
    words = [sys.executable, "-m", "data.make_teacher", *command(folder, output, shard_tokens=40)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while not list(output.glob("shard-*")) and time.monotonic() < until:
        time.sleep(0.002)
    process.kill()
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in output.glob("shard-*/ids.npy")}
    (output / ".shard-00009.1.part").mkdir()  # as a kill in the middle of a shard leaves it
    assert made
    if not (output / "meta.json").exists():
        with pytest.raises(DataError, match="is unfinished; call python -m data.make_teacher"):
            opened(folder, output)
    assert make_teacher.main(command(folder, output, shard_tokens=40)) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    assert not list(output.glob(".*.part"))
    whole, resumed = opened(folder, folder / "scores"), opened(folder, output)
    for number in range(len(whole)):
        for want, got in zip(whole.scores(number, 0, 9), resumed.scores(number, 0, 9), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4)


def test_parts_make_one_folder(folder, tmp_path, capsys):
    output = tmp_path / "parts"
    assert make_teacher.main(command(folder, output, part="1/2")) == 0
    assert "shards are still to come" in capsys.readouterr().out
    assert make_teacher.main(command(folder, output, part="0/2")) == 0
    assert opened(folder, output).fingerprint == opened(folder, folder / "scores").fingerprint


def test_another_teacher_is_not_mixed_in(folder):
    other = command(folder, folder / "scores", load_model=folder / "student.pth")
    with pytest.raises(InputError, match="shard-00000: was made with teacher"):
        make_teacher.main(other)


def test_a_quantized_teacher_is_near_its_own_and_another_one(folder, tmp_path):
    words = command(folder, tmp_path / "scores", load_model=folder / "small.pth")
    assert make_teacher.main(words) == 0
    exact, small = (opened(folder, f / "scores").scores(0, 0, 9) for f in (folder, tmp_path))
    assert 0 < np.abs(exact[1].astype(float) - small[1].astype(float)).max() < 0.5
    with pytest.raises(InputError, match="shard-00000: was made with teacher"):
        make_teacher.main(command(folder, tmp_path / "scores"))


def test_what_a_file_lacks_is_said(folder, tmp_path):
    with pytest.raises(DataError, match=r"temperatures 1, 2, --temperature is 3; use one of"):
        opened(folder, folder / "scores", temperature=3.0)
    assert opened(folder, folder / "scores", temperature=1.0).scores(0, 0, 2)[2].tolist() == [0, 0]
    with pytest.raises(DataError, match="holds no teacher's scores; make them with"):
        opened(folder, folder / "data.jsonl")


@pytest.mark.parametrize("k", [3, 50])
def test_rlhf_files_of_any_k(folder, tmp_path, k):
    """Flattened float32 logits and int64 ids; only the renormalized losses can use them."""
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "distill.h5"
    draw = np.random.default_rng(0)
    lengths = [5, 9]
    ids = [np.stack([draw.permutation(256)[:k] for _ in range(n)]) for n in lengths]
    logits = [draw.normal(size=(n, k)).astype(np.float32) for n in lengths]
    with h5py.File(path, "w") as file:
        for name, rows, kind in (
            ("tokens", [draw.integers(0, 256, n) for n in lengths], np.int64),
            ("top_k_values", [row.ravel() for row in logits], np.float32),
            ("top_k_indices", [row.ravel() for row in ids], np.int64),
        ):
            data = file.create_dataset(name, (2,), dtype=h5py.vlen_dtype(kind), compression="gzip")
            for number, row in enumerate(rows):
                data[number] = row
    store = opened(folder, path, normalized=False)
    assert store.k == k and store.lengths.tolist() == lengths
    found, values, lse = store.scores(1, 0, 9)
    assert lse is None
    order = np.argsort(-logits[1].astype(np.float16), axis=1, kind="stable")
    assert np.array_equal(found, np.take_along_axis(ids[1], order, axis=1))
    assert np.array_equal(values, np.take_along_axis(logits[1].astype(np.float16), order, axis=1))
    with pytest.raises(DataError, match="has no log-sum-exp, .*use --kd_loss renormalized"):
        opened(folder, path)


def test_rlhf_file_with_a_ragged_record(folder, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w") as file:
        for name, row, kind in (
            ("tokens", [1, 2, 3], np.int64),
            ("top_k_values", [0.0] * 7, np.float32),
            ("top_k_indices", [0] * 7, np.int64),
        ):
            data = file.create_dataset(name, (1,), dtype=h5py.vlen_dtype(kind))
            data[0] = row
    with pytest.raises(DataError, match="record 0 has 7 scores for 3 tokens"):
        opened(folder, path, normalized=False)


@pytest.mark.parametrize(
    "more",
    [
        {"infctx": 1, "chunk_ctx": 16, "state": 1},
        {"kd_loss": "renormalized", "top_k": 4, "packing": 0, "micro_bsz": 2},
        {"kd_loss": "jsd", "teacher_model": "teacher.pth", "temperature": 3},
        {"kd_loss": "jsd", "teacher_model": "small.pth", "temperature": 3},
    ],
    ids=["forward in chunks", "renormalized", "a teacher beside", "a quantized teacher beside"],
)
def test_training(folder, tmp_path, more):
    """The student comes nearer to its teacher, on the training and on the held-out records."""
    beside = "teacher_model" in more
    more = more | ({"teacher_model": folder / more["teacher_model"]} if beside else {})
    values = {
        "load_model": folder / "student.pth",
        "train_data_file": folder / ("data.jsonl" if beside else "scores"),
        "proj_dir": tmp_path / "out",
        "cache_dir": folder / "cache",
        "distillation": 1,
        "alpha": 0.1,
        "smoothing": 0.001,
        "accelerator": "cpu",
        "kernel": "torch",
        "ctx_len": 96,
        "epoch_steps": 10,
        "lr_init": 1e-2,
        "lr_final": 1e-2,
        "val_fraction": 0.2,
        "num_workers": 0,
    } | more
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    assert train.main(words) == 0
    log = read_log(tmp_path / "out" / "train_log.jsonl")
    held_out = [line["val_kl"] for line in log if "val_kl" in line]
    assert held_out[-1] < 0.9 * held_out[0]
    assert {"nll", "kl", "accuracy"} <= next(line for line in log if "loss" in line).keys()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("alpha", 1.5, "--alpha 1.5: must be from 0 to 1"),
        ("temperature", 0, "--temperature 0: must be above 0"),
        ("top_k", 0, "--top_k 0: must be at least 1"),
    ],
)
def test_wrong_values(folder, tmp_path, name, value, message):
    words = f"--load_model {folder}/student.pth --train_data_file {folder}/scores"
    words += f" --proj_dir {tmp_path}/out --cache_dir {folder}/cache --accelerator cpu"
    words += f" --distillation 1 --kernel torch --ctx_len 64 --{name} {value}"
    with pytest.raises(InputError, match=message):
        train.main(words.split())


@pytest.mark.parametrize(
    "more, message",
    [
        ({"temperature": 0}, "--temperature 0: must be above 0"),
        ({"top_k": 0}, "--top_k and --shard_tokens: must be at least 1"),
        ({"part": "4/4"}, "--part 4/4: is no part; write I/N"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_wrong_values_of_the_command_write_nothing(folder, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        make_teacher.main(command(folder, tmp_path / "s", **more))
    assert not (tmp_path / "s").exists()


def test_a_teacher_without_numbers_is_refused(folder, tmp_path):
    tensors = dict(read_tensors(folder / "teacher.pth"))
    tensors["head.weight"] = torch.full_like(tensors["head.weight"], 3e38)
    write_tensors(tmp_path / "large.pth", tensors)
    with pytest.raises(RunError, match="scores of the model are no finite numbers"):
        make_teacher.main(command(folder, tmp_path / "s", load_model=tmp_path / "large.pth"))


def test_a_hugging_face_teacher_without_the_package_says_so(folder, tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RunError, match="needs the package transformers .*; pip install"):
        make_teacher.main(command(folder, tmp_path / "s", load_model=tmp_path / "hf"))
