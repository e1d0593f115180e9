"""The loss curves of one training run on every wkv backend, laid over each other.

    python -m tests.bench_curves --work FOLDER --jobs 4                      # on a GPU, bfloat16
    python -m tests.bench_curves --work FOLDER --kernels torch reference --steps 10     # on a CPU

trains the quickstart's model with the quickstart's LoRA, flags and seed once with each `--kernel`
of train.py, on two kinds of data, the first at two learning rates:

    quickstart   the quickstart's rows, which it learns until hardly any loss is left
    slowly       the same at a sixtieth of its learning rate, so that all steps have some loss
    texts        the Python files of this repository, on which the loss stays above a nat, at a
                 third of the quickstart's learning rate

One more run, `KERNEL row by row`, is the first kernel's with the rows of each step one after the
other: the same loss and gradient, rounded otherwise. What lies between it and the first kernel's
own run is what rounding alone makes of a training run; nothing closer can be asked of a kernel. In
float32 (`--kernels triton torch --flags --precision fp32`) that is much less than in bfloat16.

Curves are smoothed by the mean of 10 steps, from 5 before a step to 4 behind it, fewer at the ends.
The distance of two curves at a step is the difference of their losses, in nats a token, or that
over the first kernel's loss; tables have the largest over all steps, smoothed and not. Where
the first kernel's smoothed loss is below 0.1 nats a relative distance is one of small numbers that
each hang on a few tokens, so one column leaves these steps out, and the last line goes by it.

Only the wkv operator changes with `--kernel`; on a GPU the fused kernels around it are the same in
all runs. A run that fails, or takes longer than `--seconds`, is a line with its error and the steps
that it made. FOLDER/DATA.png shows the curves.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv import cli
from rwkv.ops.wkv7 import BACKENDS
from rwkv.training.step_log import read_log
from tests.train_runs import flag_words, logged_steps, run_within

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "example" / "Quickstart"
WINDOW = 10  # steps
FLOOR = 0.1  # nats
LIMIT = 0.01
SHOWN = (1, 20, 50, 100, 150, 200)


class Curve(NamedTuple):
    """What a run logged.

    losses: of each step, nats a token.
    held_out: step -> held-out loss, nats a token.
    seconds: that the whole run took.
    error: why it ended early; empty if it did not.
    """

    losses: list[float]
    held_out: dict[int, float]
    seconds: float
    error: str


class Apart(NamedTuple):
    """The largest distance of two curves, and the step where it is, counted from 1."""

    distance: float
    step: int


def make_quickstart(folder: Path) -> None:
    """train.jsonl and val.jsonl of the quickstart."""
    command = [sys.executable, str(QUICKSTART / "make_data.py"), "--output", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_texts(folder: Path) -> None:
    """This repository's Python files as texts; some of every tenth are held out."""
    names = ("data", "losses", "peft", "rwkv", "tests")
    files = sorted(path for name in names for path in (ROOT / name).rglob("*.py"))
    rows = [json.dumps({"text": path.read_text(encoding="utf-8")}) + "\n" for path in files]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(r for n, r in enumerate(rows) if n % 10))
    (folder / "val.jsonl").write_text("".join(rows[::10][:5]))


KERNELS = {"gpu": ("cuda", "triton", "fla", "torch"), "cpu": ("torch", "reference")}
DATA = {"quickstart": make_quickstart, "slowly": make_quickstart, "texts": make_texts}
RATES = {"quickstart": (3e-3, 2e-4), "slowly": (5e-5, 5e-5), "texts": (1e-3, 1e-4)}  # first, last


def train(
    work: Path, data: str, name: str, changed: dict[str, Any], options: argparse.Namespace
) -> Curve:
    """One run of train.py.

    Args:
        work: has the folders of data; gets the run's.
        data: a key of DATA.
        name: of the run's folder.
        changed: flags beside the quickstart's.
        options: of the command line.
    """
    folder = work / "runs" / f"{data} {name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = {
        "sft": 1,
        "load_model": QUICKSTART / "base.pth",
        "layer_profile": QUICKSTART / "profile.json",
        "train_data_file": work / data / "train.jsonl",
        "val_data_file": work / data / "val.jsonl",
        "val_every": 50,
        "ctx_len": 512,
        "micro_bsz": options.rows,
        "grad_cp": 0,
        "lr_init": RATES[data][0],
        "lr_final": RATES[data][1],
        "lr_schedule": "cosine",
        "warmup_steps": min(10, options.steps),
        "num_workers": 0,
        "accelerator": "gpu" if options.on_gpu else "cpu",
        "precision": "bf16" if options.on_gpu else "fp32",
        "proj_dir": folder,
        "cache_dir": work / "cache",
    } | changed
    flags["epoch_steps"] = options.steps * flags.get("accumulate_grad_batches", 1)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    begun = time.monotonic()
    status, last = run_within(
        [sys.executable, "train.py", *flag_words(flags), *options.flags],
        options.seconds,
        cwd=ROOT,
        log=folder / "output.log",
        environment=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    losses = [line["loss"] for line in logged_steps(folder)]
    log = read_log(folder / "train_log.jsonl")
    held_out = {line["step"]: line["val_loss"] for line in log if "val_loss" in line}
    error = "" if status == 0 else last
    if status is None:
        error = f"out of time after {options.seconds:.0f} s and {len(losses)} steps"
    return Curve(losses, held_out, time.monotonic() - begun, error)


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of WINDOW steps around each, fewer at both ends."""
    half = WINDOW // 2
    windows = (losses[max(0, n - half) : n + half] for n in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def farthest(
    losses: Sequence[float], want: Sequence[float], *, relative: bool, floor: float = 0.0
) -> Apart:
    """The largest distance of two curves over the steps that both have.

    Args:
        losses, want: of each step, positive.
        relative: over `want`.
        floor: steps where `want` is less are left out.
    """
    found = Apart(0.0, 0)
    for step, (one, other) in enumerate(zip(losses, want, strict=False), start=1):
        distance = abs(one - other) / (other if relative else 1.0)
        if other >= floor:
            found = max(found, Apart(distance, step))
    return found


def compare(data: str, curves: dict[str, Curve], picture: Path) -> None:
    """Print both tables and what follows from them, and draw."""
    steps = max(len(curve.losses) for curve in curves.values())
    shown = sorted({step for step in SHOWN if step < steps} | {steps} - {0})
    print(f"\n**{data}, {steps} steps: loss, mean of {WINDOW} steps**\n")
    print_row("Kernel", *shown, "Held out: before", "after", "Seconds", "Error")
    print_row(*["---"] * (len(shown) + 5))
    for name, curve in curves.items():
        smoothed = smooth(curve.losses)
        losses = [f"{smoothed[n - 1]:.4f}" if n <= len(smoothed) else "" for n in shown]
        held = [f"{curve.held_out[n]:.4f}" if n in curve.held_out else "" for n in (0, steps)]
        print_row(name, *losses, *held, f"{curve.seconds:.0f}", curve.error)
    able = {name: curve for name, curve in curves.items() if curve.losses}
    if len(able) < 2:
        print(f"\n{data}: fewer than two runs trained, there is nothing to compare", flush=True)
        return
    (first, want), *others = able.items()
    print(f"\n**{data}: largest distance from {first}**\n")
    every = ("every step", "every step, nats")
    above = f"smoothed, above {FLOOR} nats"
    print_row("Kernel", above, "smoothed", "smoothed, nats", *every, "held out, nats")
    print_row(*["---"] * 7)
    found: dict[str, list[str]] = {}
    if ended := [name for name, curve in curves.items() if curve.error]:
        found["unfinished"] = ended
    for name, curve in others:
        both = min(len(curve.losses), len(want.losses))  # windows end where the shorter curve does
        pair = curve.losses[:both], want.losses[:both]
        means = smooth(pair[0]), smooth(pair[1])
        over = farthest(*means, relative=True, floor=FLOOR)
        cells = [f"{100 * over.distance:.3g}% at {over.step}"]
        for couple in (means, pair):
            for relative in (True, False):
                far = farthest(*couple, relative=relative)
                size = f"{100 * far.distance:.3g}%" if relative else f"{far.distance:.2g}"
                cells.append(f"{size} at {far.step}")
        common = curve.held_out.keys() & want.held_out.keys()
        held_apart = max((abs(curve.held_out[n] - want.held_out[n]) for n in common), default=0.0)
        print_row(name, *cells, f"{held_apart:.2g}")
        verdict = "within" if over.distance <= LIMIT else "not within"
        found.setdefault(f"{verdict} {LIMIT:.0%} of {first}", []).append(name)
    draw(able, picture)
    verdicts = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in found.items())
    counted = sum(loss >= FLOOR for loss in smooth(want.losses))
    print(
        f"\n{data}, {counted} steps above {FLOOR} nats: {verdicts}; drawn in {picture}", flush=True
    )


def print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def draw(curves: dict[str, Curve], picture: Path) -> None:
    """Losses by step, and how far the smoothed ones are from the first kernel's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, distances = figure.subplots(1, 2)
    first, want = next(iter(curves.items()))
    for number, (name, curve) in enumerate(curves.items()):
        color = f"C{number}"
        both = min(len(curve.losses), len(want.losses))
        means, others = smooth(curve.losses[:both]), smooth(want.losses[:both])
        steps = range(1, both + 1)
        losses.plot(steps, curve.losses[:both], color=color, linewidth=0.5, alpha=0.2)
        width, alpha = (3.0, 0.5) if name == first else (1.0, 1.0)  # the first lies below all
        losses.plot(steps, means, color=color, linewidth=width, alpha=alpha, label=name)
        if name != first:
            apart = [100 * (a / b - 1) for a, b in zip(means, others, strict=True)]
            distances.plot(steps, apart, color=color, linewidth=1.2, label=name)
    losses.set_yscale("log")
    losses.set_title(f"loss, nats a token: each step and mean of {WINDOW}")
    distances.set_title(f"% from {first}, means of {WINDOW} steps")
    for bound in (-100 * LIMIT, 100 * LIMIT):
        distances.axhline(bound, color="0.6", linestyle="--", linewidth=0.8)
    for axes in (losses, distances):
        axes.set_xlabel("step")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(picture))


def main() -> int:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--kernels", nargs="+", choices=BACKENDS, metavar="KERNEL")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=2, help="of 512 tokens, a step")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--seconds", type=float, default=300, help="limit of a run")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu" if on_gpu else "cpu")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for train.py")
    options = parser.parse_args()
    options.on_gpu = options.device == "gpu"
    work = options.work.resolve()
    first, *_ = kernels = options.kernels or KERNELS[options.device]
    runs: dict[str, dict[str, Any]] = {kernel: {"kernel": kernel} for kernel in kernels}
    runs[f"{first} row by row"] = {
        "kernel": first,
        "micro_bsz": 1,
        "accumulate_grad_batches": options.rows,
    }
    for data in options.data:
        DATA[data](work / data)
    where = torch.cuda.get_device_name() if options.on_gpu else "CPU"
    print(f"{where}, torch {torch.__version__}, {options.jobs} runs at the same time", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        begun = {
            data: {
                name: pool.submit(train, work, data, name, changed, options)
                for name, changed in runs.items()
            }
            for data in options.data
        }
        for data, futures in begun.items():
            curves = {name: future.result() for name, future in futures.items()}
            compare(data, curves, work / f"{data}.png")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
