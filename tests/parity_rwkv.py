"""What the PyPI package `rwkv` computes, to hold ours to.

The package has the name of our folder, so it lies in a folder of its own and runs in a process
that cannot see ours:

    python -m pip install --no-deps --target .venv/parity rwkv==0.8.32

Tests call `ask_peer`, benchmarks `time_peer`. As a program, `python tests/parity_rwkv.py FOLDER`
writes tests/golden/logits.json anew, from the models in FOLDER/models and from random ones.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".venv" / "parity"
GOLDEN = ROOT / "tests" / "golden" / "logits.json"
INSTALL = "python -m pip install --no-deps --target .venv/parity rwkv==0.8.32"


class PeerAnswer(NamedTuple):
    """logits: after each token, [T, V], float32. written: the likeliest tokens after them."""

    logits: np.ndarray
    written: list[int]


def skip_without_peer() -> None:
    """Skip the running test if the package is not there."""
    import pytest

    if not (PEER / "rwkv" / "model.py").is_file():
        pytest.skip(f"no package rwkv in .venv/parity; {INSTALL}")


def ask_peer(
    model: Path, tokens: Sequence[int], *, count: int = 0, state: Path | None = None
) -> PeerAnswer:
    """Let the package read `tokens` and write `count` more, always the likeliest.

    Args:
        model: a .pth file of version 6 or 7.
        tokens: two at least.
        count: tokens to write.
        state: a .pth file with blocks.N.att.time_state, and blocks.N.shift_state if it has them,
            to start from, or None.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.npz"
        question = {
            "model": str(Path(model).resolve()),
            "tokens": list(tokens),
            "count": count,
            "state": None if state is None else str(Path(state).resolve()),
            "answer": str(answer),
        }
        command = [sys.executable, __file__, json.dumps(question)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the package rwkv failed:\n{done.stderr[-2000:]}")
        with np.load(answer) as arrays:
            return PeerAnswer(arrays["logits"], arrays["written"].tolist())


class PeerSpeed(NamedTuple):
    """answers: so many prompts were answered. read, wrote: seconds for each, on average."""

    answers: int
    read: float
    wrote: float


def time_peer(
    model: Path,
    *,
    prompt_tokens: int,
    tokens: int,
    seconds: float,
    strategy: str,
    own_kernels: bool = False,
) -> PeerSpeed:
    """Let the package continue prompts one after the other, always with the likeliest token.

    Args:
        model: a .pth file of version 7.
        prompt_tokens: of each prompt.
        tokens: to write after each.
        seconds: no further prompt is begun after this time.
        strategy: where and in what it computes, in the package's words, such as "cuda bf16".
        own_kernels: whether it compiles and uses its CUDA kernels.
    """
    question = {
        "timed": str(Path(model).resolve()),
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "seconds": seconds,
        "strategy": strategy,
        "own_kernels": own_kernels,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, json.dumps(question)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the package rwkv failed:\n{done.stderr[-2000:]}\n{INSTALL}")
    return PeerSpeed(*json.loads(done.stdout.splitlines()[-1]))


def _time(question: dict[str, Any]) -> None:
    """In the subprocess: print what `time_peer` returns."""
    sys.path.insert(0, str(PEER))
    cuda = str(int(question["own_kernels"]))
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON=cuda)
    from rwkv.model import RWKV

    model = RWKV(model=question["timed"].removesuffix(".pth"), strategy=question["strategy"])

    def answer(prompt_tokens: int, tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        logits, state = model.forward(list(range(1, prompt_tokens + 1)), None)
        token = int(logits.argmax())
        read = time.perf_counter()
        for _ in range(tokens - 1):
            logits, state = model.forward([token], state)
            token = int(logits.argmax())
        return read - start, time.perf_counter() - read

    answer(8, 8)
    times: list[tuple[float, float]] = []
    while sum(map(sum, times)) < question["seconds"]:
        times.append(answer(question["prompt_tokens"], question["tokens"]))
    read, wrote = (sum(column) / len(times) for column in zip(*times, strict=True))
    sys.stdout.write(json.dumps([len(times), read, wrote]) + "\n")


def _answer(question: dict[str, Any]) -> None:
    """In the subprocess: load the model with the package and save what was asked for."""
    sys.path.insert(0, str(PEER))
    import torch

    torch.set_num_threads(1)
    tensors = torch.load(question["model"], map_location="cpu", weights_only=True)
    tuned = {}
    if question["state"]:
        tuned = torch.load(question["state"], map_location="cpu", weights_only=True)
    seven = "blocks.0.att.r_k" in tensors
    os.environ.update(RWKV_V7_ON="1" if seven else "0", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    from rwkv.model import RWKV

    path = Path(question["answer"]).with_name("model.pth")
    torch.save(tensors if seven else tensors | tuned, path)
    model = RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")
    state = None
    shifts = [tuned[name].float() for name in tuned if name.endswith(".shift_state")]
    if tuned and (seven or shifts):  # of all this it reads by itself RWKV-6's wkv states alone
        state = []
        for layer in range(model.args.n_layer):
            wkv = tuned[f"blocks.{layer}.att.time_state"].float()
            if not seven:  # keys on rows
                wkv = wkv.transpose(1, 2).contiguous()
            zero = torch.zeros(model.args.n_embd)
            att, ffn = shifts[layer] if shifts else (zero, zero)
            state += [att, wkv, ffn]
    logits, state = model.forward(question["tokens"], state, full_output=True)
    written: list[int] = []
    last = logits[-1]
    for _ in range(question["count"]):
        written.append(int(last.argmax()))
        last, state = model.forward(written[-1:], state)
    np.savez(question["answer"], logits=logits.float().numpy(), written=np.array(written, int))


def write_golden(assets: Path) -> None:
    """Keep the package's logits of the models in `assets` and of two random models."""
    import torch
    from oracle import random_tensors

    rows: dict[str, Any] = {}

    def keep(name: str, path: Path, tokens: list[int]) -> None:
        last = ask_peer(path, tokens).logits[-1]
        rows[name] = {"tokens": tokens, "last": last.astype(np.float64).round(6).tolist()}

    for name in ("tiny-rwkv-6v0-1m", "tiny-rwkv-7v0-834K"):
        keep(name, assets / "models" / f"{name}.pth", [34, 105, 110])
    for version in (6, 7):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.pth"
            tensors = random_tensors(version)
            torch.save({name: torch.from_numpy(t) for name, t in tensors.items()}, path)
            tokens = np.random.default_rng(version).integers(0, 32, 20).tolist()
            keep(f"random {version}", path, tokens)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy")]
    made_by = ", ".join(["rwkv 0.8.32", *versions])
    GOLDEN.write_text(json.dumps({"made by": made_by, "logits": rows}) + "\n")


if __name__ == "__main__":
    if sys.argv[1].startswith("{"):
        asked = json.loads(sys.argv[1])
        (_time if "timed" in asked else _answer)(asked)
    else:
        write_golden(Path(sys.argv[1]))
