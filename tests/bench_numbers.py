"""Teach a model that reverses numbers of up to 60 digits longer ones, and count what it keeps.

    python -m tests.bench_numbers --model rwkv7-reverse-60digits.pth --work FOLDER

Runs the recipes below side by side, each a run of train.py over all weights, and lets the model
before and after each answer held-out numbers. `--only` names recipes, `--device gpu` trains there.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.train_runs import flag_words

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "example"
TOKENIZER = ["--tokenizer", "chars:0123456789,#"]
COMMON = {
    "template": "plain",
    "ctx_len": 160,
    "beta2": 0.999,
    "lr_schedule": "linear",
    "warmup_steps": 30,
    "grad_cp": 0,
    "precision": "fp32",
    "num_workers": 0,
}
RECIPES: dict[str, dict[str, Any]] = {
    "long": {
        "lengths": "55-72",
        "flags": {"micro_bsz": 64, "epoch_steps": 120, "lr_init": 1e-5, "lr_final": 1e-7},
    },
    "gentle": {
        "lengths": "1-44:1,45-60:6,61-70:4",
        "flags": {"micro_bsz": 64, "epoch_steps": 300, "lr_init": 1e-5, "lr_final": 1e-7},
    },
    "far": {
        "lengths": "1-44:2,45-60:5,61-72:3",
        "flags": {"micro_bsz": 128, "epoch_steps": 1500, "lr_init": 5e-5, "lr_final": 1e-7},
    },
    "near": {
        "lengths": "1-50:4,51-60:14,61-66:1",
        "flags": {"micro_bsz": 512, "epoch_steps": 600, "lr_init": 3e-5, "lr_final": 1e-7},
    },
    "wide": {
        "lengths": "1-50:40,51-60:140,61-66:9,67-72:1",
        "flags": {"micro_bsz": 256, "epoch_steps": 330, "lr_init": 3e-5, "lr_final": 1e-7},
    },
    "kept": {
        "lengths": "1-50:8,51-56:6,57-60:8,61-72:1",
        "flags": {"micro_bsz": 512, "epoch_steps": 600, "lr_init": 3e-5, "lr_final": 1e-7},
    },
}


def make(path: Path, lengths: str, rows: int, seed: int) -> None:
    command = [sys.executable, str(EXAMPLE / "SFT" / "make_numbers.py"), "--lengths", lengths]
    command += ["--rows", str(rows), "--seed", str(seed), "--output", str(path)]
    subprocess.run(command, check=True)


def answer(work: Path, model: Path, device: str) -> dict[str, str]:
    """Exact answers by length, of 500 numbers up to 50 digits, 1,000 up to 60, 401 up to 70."""
    command = [sys.executable, str(EXAMPLE / "check_answers.py"), "--load_model", str(model)]
    command += [*TOKENIZER, "--template", "plain", "--stop", "#", "--tokens", "80"]
    command += ["--data", str(work / "held-out.jsonl"), "--by_length", "50,60,65,70"]
    command += ["--device", "cuda" if device == "gpu" else "cpu", "--dtype", "fp32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def teach(name: str, options: argparse.Namespace) -> dict[str, str]:
    """Train by a recipe, and count."""
    recipe, work = RECIPES[name], options.work
    flags = recipe["flags"]
    data, output = work / f"{name}.jsonl", work / name
    make(data, recipe["lengths"], flags["micro_bsz"] * flags["epoch_steps"], 1)
    values = {
        "sft": 1,
        "load_model": options.model.resolve(),
        "train_data_file": data,
        "proj_dir": output,
        "cache_dir": work / "cache",
        "accelerator": options.device,
    }
    command = [sys.executable, "train.py", *flag_words(values | COMMON | flags), *TOKENIZER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return answer(work, output / "rwkv-0.pth", options.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/numbers"))
    parser.add_argument("--only", default=",".join(RECIPES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--at_once", type=int, default=8, help="runs side by side")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    parts = []
    for lengths, rows in (("1-50", 500), ("51-60", 1000), ("61-65", 200), ("66-70", 201)):
        make(options.work / "part.jsonl", lengths, rows, 1000 + rows)
        parts.append((options.work / "part.jsonl").read_text())
    (options.work / "held-out.jsonl").write_text("".join(parts))
    names = options.only.split(",")
    with ThreadPoolExecutor(options.at_once) as pool:
        before = pool.submit(answer, options.work, options.model.resolve(), options.device)
        after = {name: pool.submit(teach, name, options) for name in names}
    print("| Recipe | Lengths | Flags | 1 to 50 | 51 to 60 | 61 to 65 | 66 to 70 |")
    print("|---|---|---|---|---|---|---|")
    for name, done in {"before": before, **after}.items():
        recipe = RECIPES.get(name, {"lengths": "", "flags": {}})
        flags = " ".join(f"{key} {value}" for key, value in recipe["flags"].items())
        result = done.result()
        counts = [value for key, value in result.items() if key.startswith("exact, ")]
        shown = [name, recipe["lengths"], flags, *(counts or [result.get("error", "")])]
        print("| " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
