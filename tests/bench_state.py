"""State tuning in numbers: a frozen model whose answers a trained start turns.

    python tests/bench_state.py --model rwkv7-reverse-60digits.pth --output FOLDER

The model reverses numbers ("123," -> "321#"). Its weights stay as they are; a state, or a prefix
of embeddings, is trained on 4 to 8 digits until it answers otherwise:

    zero    "3210#": a zero behind the answer
    three   the first three digits of the answer alone
    first   the first digit alone

One line of a table for each: answers to 200 held-out numbers that are right in the new sense,
before and after, and those whose text the PyPI package rwkv writes too from the saved state (of 5,
see tests/parity_rwkv.py; - where it is not installed).
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from parity_rwkv import PEER, ask_peer  # noqa: E402

DIGITS = "chars:0123456789,#"
TASKS = {
    "zero": lambda number: number[::-1] + "0",
    "three": lambda number: number[::-1][:3],
    "first": lambda number: number[-1],
}
STARTS = {
    "state": ["--state", 1],
    "prefix": ["--prefix_tuning", 1, "--prefix_token_len", 16],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=0.1)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    profile = options.output / "profile.json"
    rule = {"match": "blocks.*", "mode": "freeze"}
    rates = {"state_lr_init": options.rate, "state_lr_final": options.rate / 50}
    profile.write_text(json.dumps({"rules": [rule | rates]}))
    print("| trains | task | right before | after | same in rwkv | an answer | seconds |")
    print("|---|---|---|---|---|---|---|")
    for start in options.starts:
        for task in options.tasks:
            print(line(start, task, profile, options), flush=True)
    return 0


def line(start: str, task: str, profile: Path, options: argparse.Namespace) -> str:
    """Train, then count; the line of the table."""
    folder = options.output / start / task
    rows = {name: numbers(n, seed) for name, n, seed in (("train", 6400, 0), ("val", 200, 1))}
    for name, some in rows.items():
        text = [{"prompt": f"{n},", "completion": f"{TASKS[task](n)}#"} for n in some]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    words = ["train.py", "--sft", 1, "--load_model", options.model, "--tokenizer", DIGITS]
    words += ["--template", "plain", "--train_data_file", folder / "train.jsonl", *STARTS[start]]
    words += ["--layer_profile", profile, "--ctx_len", 24, "--packing", 0, "--micro_bsz", 32]
    words += ["--epoch_steps", options.steps, "--lr_schedule", "cosine", "--warmup_steps", 10]
    words += ["--l2wrap", 0, "--grad_cp", 0, "--num_workers", 0, "--precision", "fp32"]
    words += ["--cache_dir", folder / "cache", "--proj_dir", folder / "run"]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = time.perf_counter() - begin
    state = folder / "run" / "rwkv-0-state.pth"
    before, after = (
        answers(options.model, None, rows["val"]),
        answers(options.model, state, rows["val"]),
    )
    right = [
        sum(answer == TASKS[task](n) for answer, n in zip(found, rows["val"], strict=True)) / 200
        for found in (before, after)
    ]
    same = "-"
    if PEER.is_dir():
        agree = [peer_answer(options.model, state, n) for n in rows["val"][:5]]
        same = f"{sum(a == b for a, b in zip(agree, after, strict=False))} of 5"
    number = rows["val"][0]
    return (
        f"| {start} | {task} | {right[0]:.1%} | {right[1]:.1%} | {same} | "
        f"{number}, -> {after[0]}# | {seconds:.0f} |"
    )


def numbers(count: int, seed: int) -> list[str]:
    """Numbers of 4 to 8 digits."""
    draw = random.Random(seed)
    return ["".join(draw.choices("0123456789", k=draw.randint(4, 8))) for _ in range(count)]


def answers(model_path: Path, state: Path | None, some: list[str]) -> list[str]:
    """What the model writes behind each number up to `#`, always the likeliest token."""
    from rwkv.checkpoint import load_model, read_tensors
    from rwkv.generate import generate
    from rwkv.runner import load_state
    from rwkv.sampling_flags import Sampling
    from rwkv.tokenizer import load_tokenizer

    model, tokenizer = load_model(model_path).requires_grad_(False), load_tokenizer(DIGITS)
    if state is not None:
        load_state(model, read_tensors(state))
    written = generate(
        model,
        [tokenizer.encode(f"{number},") for number in some],
        tokenizer=tokenizer,
        max_tokens=20,
        stop=["#"],
        sampling=Sampling(temperature=0.0),
    )
    return [answer.text.removesuffix("#") for answer in written]


def peer_answer(model: Path, state: Path, number: str) -> str:
    """The same of the package rwkv."""
    characters = DIGITS.removeprefix("chars:")
    tokens = [characters.index(character) for character in f"{number},"]
    written = ask_peer(model, tokens, count=20, state=state).written
    return "".join(characters[token] for token in written).partition("#")[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
