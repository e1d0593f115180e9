"""What train.py adds to the bare step: tokens a second of both on the same packed texts.

    python -m tests.bench_through --work FOLDER
    python -m tests.bench_through --work FOLDER --row bone-1.5B-8 --only packed deepspeed_stage_2
    python -m tests.bench_through --work FOLDER --profile deepspeed_stage_2

Lines, each the median over the steps after the first three:

    full     the bare step of `bench_step` on rows without a gap, all tokens scored
    packed   the bare step on the micro-batches that train.py makes: texts of many lengths, packed
    auto, deepspeed_stage_2     train.py with that --strategy

`packed` over `full` is what the data costs, a strategy over `packed` is what the loop around the
step costs: clipping, the log, Lightning, DeepSpeed. Model and texts are random and stay in FOLDER.

`--profile` runs one strategy alone, and after `--steps` steps prints of three each: the share of
the time in which the GPU does nothing and its longest pauses; where the host waits for it, and its
time by operator, under a profiler that slows it down; and the functions that the main thread is
in, under Python's profiler.
"""

import argparse
import cProfile
import gc
import json
import pstats
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import train
from rwkv import cli
from rwkv.batch import TokenBatch
from rwkv.checkpoint import write_tensors
from rwkv.errors import InputError
from rwkv.files import remove
from rwkv.flags import Settings, parse
from rwkv.ops.packing import remember_lengths, text_lengths
from rwkv.run.batches import open_data
from rwkv.run.models import plan_layers
from rwkv.run.settings import FLAGS
from rwkv.tokenizer import load_tokenizer
from rwkv.training.lit import LitModel
from tests.bench_step import RANK, ROWS, Row, Training, emptied, random_model
from tests.train_runs import flag_words, logged_steps

BARE, STRATEGIES = ("full", "packed"), ("auto", "deepspeed_stage_2")
SKIPPED = 3  # steps in which kernels are compiled and memory is found
PROFILED = 3
WAITS = ("Synchronize", "aten::_local_scalar_dense", "aten::nonzero")


def words(row: Row, work: Path, strategy: str, steps: int, device: str) -> list[str]:
    """The command line of a run of train.py."""
    flags: dict[str, Any] = {
        "sft": 1,
        "load_model": work / "model.pth",
        "train_data_file": work / "texts.jsonl",
        "cache_dir": work / "cache",
        "tokenizer": "bytes",
        "proj_dir": work / f"run-{strategy}",
        "ctx_len": row.tokens,
        "micro_bsz": row.rows,
        "epoch_steps": steps,
        "num_workers": 0,
        "grad_cp": row.grad_cp,
        "grad_cp_memory": row.kept,
        "grad_cp_offload": int(row.offload),
        "strategy": strategy,
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "limited_lora": int(not row.small),
    }
    if row.mode != "full":
        flags["layer_profile"] = work / "profile.json"
    return flag_words(flags)


def prepare(row: Row, work: Path, device: str, steps: int) -> None:
    """The model's file, its profile, and texts for some steps."""
    work.mkdir(parents=True, exist_ok=True)
    with emptied(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = random_model(replace(row, mode="full"), device, dtype)
        write_tensors(work / "model.pth", model.state_dict())
        del model
    rule = {"match": "blocks.*", "mode": row.mode, "rank": RANK, "alpha": RANK}
    (work / "profile.json").write_text(json.dumps({"rules": [rule]}))
    draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz "
    left = (steps + 1) * row.rows * row.tokens
    with (work / "texts.jsonl").open("w") as file:
        while left > 0:
            size = draw.randint(row.tokens // 16, row.tokens)
            file.write(json.dumps({"text": "".join(draw.choices(letters, k=size))}) + "\n")
            left -= size


def bare(row: Row, device: str, batches: list[TokenBatch]) -> float:
    """Tokens a second of the step by itself, on batches that lie on the device."""
    training, done = Training(row, device), []
    for batch in batches:
        training.batch = batch
        done.append((batch.tokens(), training.step()[0]))
    if device == "cuda":
        torch.cuda.synchronize()
    speeds = [1e3 * tokens / sum(clock.milliseconds()) for tokens, clock in done[SKIPPED:]]
    return statistics.median(speeds)


def packed_batches(row: Row, settings: Settings, steps: int, device: str) -> list[TokenBatch]:
    """The micro-batches of train.py, on the device."""
    tokenizer = load_tokenizer("bytes")
    plan = open_data(settings, tokenizer, plan_layers(settings, row.config())).training
    moved = []
    for number in range(steps):
        batch = plan.micro_batch(number, 0)
        there = TokenBatch(*(None if x is None else x.to(device) for x in batch))
        remember_lengths(there.cu_seqlens, text_lengths(batch.cu_seqlens))
        moved.append(there)
    return moved


def full_batches(row: Row, steps: int, device: str) -> list[TokenBatch]:
    """Rows of random tokens without a gap."""
    return [Training.random_batch(row, device)] * steps


def through(command: list[str], run: Path) -> list[dict]:
    """What train.py logs of its steps."""
    remove(run)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if train.main(command):
        raise InputError(f"{run}: train.py failed")
    return logged_steps(run)


@contextmanager
def compiled(strategies: list[str], device: str) -> Iterator[Any]:
    """Compile DeepSpeed's optimizer, which takes a minute once a machine, beside other work."""
    process = None
    if device == "cuda" and any(name.startswith("deepspeed") for name in strategies):
        code = (
            "from rwkv.training.strategy import _name_plain_architecture as name; name(); "
            "from deepspeed.ops.op_builder import FusedAdamBuilder as B; B().load(verbose=False)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        yield (process.wait if process else lambda: 0)
    finally:
        if process and process.poll() is None:
            process.kill()


def compare(row: Row, work: Path, device: str, steps: int, only: list[str]) -> None:
    """Print the lines that are asked for."""
    speeds: dict[str, float] = {}

    def show(name: str, speed: float) -> None:
        speeds[name] = speed
        against = [other for other in BARE if other in speeds and other != name]
        ratios = "".join(f"  {speed / speeds[other]:.3f} of {other}" for other in against)
        print(f"{name:20} {speed:10,.0f} tokens/s{ratios}", flush=True)

    with compiled(only, device) as wait:
        command = words(row, work, "auto", steps, device)
        settings = parse(command, FLAGS, program="train.py", description="")
        for name in only:
            with emptied(device):
                if name == "full":
                    show(name, bare(row, device, full_batches(row, steps, device)))
                elif name == "packed":
                    show(name, bare(row, device, packed_batches(row, settings, steps, device)))
                else:
                    if name.startswith("deepspeed"):
                        wait()
                    command = words(row, work, name, steps, device)
                    lines = through(command, work / f"run-{name}")[SKIPPED:]
                    show(name, statistics.median(one["tokens_per_second"] for one in lines))
                    fill = statistics.mean(one["fill"] for one in lines)
                    print(f"{'':20} rows are {fill:.1%} full", flush=True)


class Watched:
    """Profilers, one after the other, each over some of a run's steps, from the start of a forward
    pass to that of another.

    Attributes:
        kernels: of the GPU.
        operators: of the host.
        functions: Python's.
    """

    def __init__(self, device: str, first: int):
        cpu, gpu = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
        on_gpu = device == "cuda"
        self.kernels = torch.profiler.profile(activities=[gpu if on_gpu else cpu])
        self.operators = torch.profiler.profile(activities=[cpu, *[gpu] * on_gpu])
        self.functions = cProfile.Profile()
        self.first, self.step = first, 0
        self._work = [
            (self.kernels.start, self.kernels.stop),
            (self.operators.start, self.operators.stop),
            (self.functions.enable, self.functions.disable),
        ]

    @property
    def steps(self) -> int:
        """That a run must have."""
        return self.first + len(self._work) * (PROFILED + 1) + 1

    def begins(self) -> None:
        """A forward pass is about to begin."""
        for number, (start, stop) in enumerate(self._work):
            at = self.first + number * (PROFILED + 1)
            if self.step == at:
                start()
            if self.step == at + PROFILED:
                stop()
        self.step += 1


def pauses(spans: list[tuple[float, float, str]]) -> tuple[float, list[tuple[float, str, str]]]:
    """The share of the time without a kernel, and each gap with the kernels around it.

    spans: begin, end and name of each kernel.
    """
    spans = sorted(spans)
    found, (begin, end, last) = [], spans[0]
    for start, stop, name in spans[1:]:
        if start > end:
            found.append((start - end, last, name))
        if stop > end:
            end, last = stop, name
    return sum(gap for gap, _, _ in found) / (end - begin), sorted(found, reverse=True)


def profile(
    row: Row, work: Path, device: str, strategy: str, watched: Watched, top: int = 12
) -> None:
    """Print where the GPU waits for the host, and the host for the GPU."""
    real = LitModel.training_step

    def step(lit: LitModel, batch: Any, index: int) -> Any:
        watched.begins()
        return real(lit, batch, index)

    LitModel.training_step = step  # type: ignore[method-assign]
    try:
        through(words(row, work, strategy, watched.steps, device), work / f"run-{strategy}")
    finally:
        LitModel.training_step = real  # type: ignore[method-assign]
    spans = [
        (e.time_range.start, e.time_range.end, e.name)
        for e in watched.kernels.events() or []
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    if spans:
        idle, gaps = pauses(spans)
        print(f"{strategy}: the GPU is idle for {idle:.1%} of {PROFILED} steps")
        for gap, before, after in gaps[:top]:
            print(f"{gap / 1e3:9.2f} ms between {before[:50]} and {after[:50]}")
    runs: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in watched.operators.events() or []:
        if event.device_type == torch.autograd.DeviceType.CPU:
            runs[event.name] += 1
            spent[event.name] += event.self_cpu_time_total
    print("\nthe host waits in")
    for name in sorted(runs):
        if any(word in name for word in WAITS):
            print(f"{spent[name] / 1e3:9.2f} ms x{runs[name]:5}  {name}")
    print("\nthe host's time by operator")
    for name, microseconds in spent.most_common(top):
        print(f"{microseconds / 1e3:9.2f} ms x{runs[name]:5}  {name[:80]}")
    print(f"\nPython functions of the main thread in {PROFILED} steps, seconds by themselves")
    pstats.Stats(watched.functions).sort_stats("tottime").print_stats(2 * top)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", default="lora-1.5B-8", choices=list(ROWS))
    parser.add_argument("--work", type=Path, required=True, help="for the model, texts and runs")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=BARE + STRATEGIES, metavar="LINE")
    parser.add_argument("--profile", choices=STRATEGIES, metavar="STRATEGY")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("bench_through: needs a GPU, and torch sees none")
    row, work = ROWS[flags.row], flags.work.resolve()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {flags.row}", flush=True)
    watched = Watched("cuda", flags.steps)
    prepare(row, work, "cuda", watched.steps if flags.profile else flags.steps)
    if flags.profile:
        with compiled([flags.profile], "cuda") as wait:
            wait()
            profile(row, work, "cuda", flags.profile, watched)
    else:
        compare(row, work, "cuda", flags.steps, flags.only or [*BARE, *STRATEGIES])
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
