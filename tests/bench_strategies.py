"""Strategies on one GPU and on two: do they train alike, how fast, and with how much memory.

    python -m tests.bench_strategies prepare --work FOLDER        # about a minute, once a machine
    python -m tests.bench_strategies one --work FOLDER            # 4 minutes on an H100
    python -m tests.bench_strategies two --work FOLDER            # 7 minutes on two of them

`prepare` compiles DeepSpeed's two optimizers and the Triton kernels, makes the data, and writes
models of random weights, all at the same time. A table is printed as soon as its runs are over, the
ones that matter most first; `--only` names parts, `--seconds` ends it. A run that fails is a line
with its error. `--device cpu` goes the same ways with tiny models.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.train_runs import flag_words, logged_steps, run_within

ROOT = Path(__file__).resolve().parent.parent
DDP, STAGES = "ddp", [f"deepspeed_stage_{s}" for s in ("1", "2", "2_offload", "3")]
BIG = {  # name -> version, layers, channels
    "1.5B": (7, 24, 2048),
    "1.5B-v6": (6, 24, 2048),
    "7B": (7, 32, 4096),
}
LORA = {"match": "blocks.*", "mode": "lora", "rank": 16, "alpha": 32}
PROFILES = {
    "lora": LORA,
    "lora-nf4": LORA | {"quant": "nf4"},
    "only-nf4": LORA | {"quant": "nf4", "train_small": False},
    "lora64": LORA | {"rank": 64, "alpha": 64},
    "bone64": {"match": "blocks.*", "mode": "bone", "rank": 64},
    "lora64-nf4": LORA | {"rank": 64, "alpha": 64, "quant": "nf4"},
}
MODES: dict[str, dict[str, Any]] = {
    "SFT full": {"sft": 1, "lr_init": 5e-5},
    "SFT LoRA over nf4": {"sft": 1, "layer_profile": "lora-nf4.json", "lr_init": 5e-4},
    "DPO LoRA over nf4": {"dpo": 1, "layer_profile": "only-nf4.json", "lr_init": 2e-4},
    "DPO full": {"dpo": 1, "lr_init": 5e-6, "micro_bsz": 96},
    "SFT full in chunks": {"sft": 1, "infctx": 1, "lr_init": 5e-5},
    "SFT LoRA over nf4 in chunks": {
        "sft": 1,
        "infctx": 1,
        "layer_profile": "lora-nf4.json",
        "lr_init": 5e-4,
    },
}


class Run(NamedTuple):
    """A run of train.py: its name, its flags beside the common ones, when SIGTERM comes."""

    name: str
    flags: dict[str, Any]
    stop_at: int | None = None


class Bench:
    """Starts runs and reads what they logged.

    work: data, models, profiles, and a folder a run.
    """

    def __init__(self, options: argparse.Namespace):
        self.work = Path(options.work).resolve()
        self.cpu = options.device == "cpu"
        self.deadline = time.monotonic() + options.seconds
        self.steps = 4 if self.cpu else 20
        self.ctx = 128 if self.cpu else 512
        # A loss in bfloat16 is uncertain by more than is asked for unless many tokens are averaged.
        self.micro = 2 if self.cpu else 32
        self.modes = [mode for mode in MODES if not options.modes or mode in options.modes]
        self.cases = [case for case in SPEED_CASES if not options.cases or case in options.cases]
        self.reports: dict[str, list[dict]] = {}
        self.rows: list[dict] = []
        (self.work / "runs").mkdir(parents=True, exist_ok=True)

    def fitted(self, flags: dict[str, Any]) -> dict[str, Any]:
        """Without the size of batches on a CPU."""
        return {k: v for k, v in flags.items() if k != "micro_bsz"} if self.cpu else flags

    def left(self, limit: float) -> float:
        return max(0.0, min(limit, self.deadline - time.monotonic()))

    def words(self, run: Run) -> list[str]:
        values = {
            "load_model": "base.pth",
            "train_data_file": "pairs.tok" if run.flags.get("dpo") else "train.jsonl",
            "proj_dir": f"runs/{run.name}",
            "cache_dir": "cache",
            "accelerator": "cpu" if self.cpu else "gpu",
            "precision": "fp32" if self.cpu else "bf16",
            "ctx_len": self.ctx,
            "chunk_ctx": self.micro * self.ctx // 4,  # of rows that are packed into one
            "lr_final": run.flags.get("lr_init", 1e-4),
            "micro_bsz": self.micro,
            "num_workers": 0,
        } | run.flags
        return flag_words(values)

    def call(
        self, command: list[str], limit: float, *, log: str, gpus: str | None = None
    ) -> tuple[int | None, str]:
        """Exit status (None: out of time) and the output's last line; output goes to a file."""
        path = self.work / f"{log}.log"
        folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(folders),
            "OMP_NUM_THREADS": "1",
        }
        if self.cpu:
            environment["DS_ACCELERATOR"] = "cpu"
        elif gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpus
        return run_within(
            command, self.left(limit), cwd=self.work, log=path, environment=environment
        )

    def start(self, group: str, runs: list[Run], devices: int, limit: float, gpus: str) -> None:
        """Do runs one after the other in one process a rank; an error costs only its own run."""
        for run in runs:
            shutil.rmtree(self.work / "runs" / run.name, ignore_errors=True)
        self.go_on(group, runs, devices, limit, gpus)

    def go_on(self, group: str, runs: list[Run], devices: int, limit: float, gpus: str) -> None:
        until = time.monotonic() + limit
        while runs and self.left(until - time.monotonic()) > 1:
            listed = [
                {"name": run.name, "words": self.words(run), "stop_at": run.stop_at} for run in runs
            ]
            (self.work / f"{group}.runs").write_text(json.dumps(listed))
            report = self.work / f"{group}.report"
            for old in self.work.glob(f"{group}.report-*"):
                old.unlink()
            command = [sys.executable]
            if devices > 1:
                command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
                command += [str(devices)]
            command += [str(ROOT / "tests" / "several_runs.py"), f"{group}.runs", str(report)]
            command += ["--cpu"] * self.cpu
            _, last = self.call(command, until - time.monotonic(), log=group, gpus=gpus)
            ranks = [self.read(f"{report}-{rank}.jsonl") for rank in range(devices)]
            done = 0
            for run in runs:
                found = [lines[run.name] for lines in ranks if run.name in lines]
                if len(found) < devices and not any("error" in line for line in found):
                    break
                self.reports[run.name] = found
                done += 1
            if done < len(runs) and not any(
                "error" in line for line in self.reports.get(runs[done - 1].name, [])
            ):
                self.reports[runs[done].name] = [{"error": last}]
                done += 1
            runs = runs[done:]

    def read(self, path: str) -> dict[str, dict]:
        if not Path(path).exists():
            return {}
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return {line["name"]: line for line in lines}

    def log(self, name: str) -> list[dict]:
        return logged_steps(self.work / "runs" / name)

    def error(self, name: str) -> str:
        found = [line["error"] for line in self.reports.get(name, []) if "error" in line]
        return found[0][:150] if found else "" if name in self.reports else "not run"

    def peaks(self, name: str) -> str:
        return " ".join(
            f"{line['peak']:.1f}" for line in self.reports.get(name, []) if "peak" in line
        )

    def table(self, title: str, head: list[str], rows: list[list[Any]]) -> None:
        print(f"\n**{title}**\n", flush=True)
        print("| " + " | ".join(head) + " |")
        print("|" + "---|" * len(head))
        for row in rows:
            shown = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
            print("| " + " | ".join(shown) + " |", flush=True)
            self.rows.append({"table": title} | dict(zip(head, row, strict=True)))


def prepare(bench: Bench, sizes: list[str], ops: bool) -> None:
    """Data, profiles, models; DeepSpeed's optimizers compiled. Done once for a folder."""
    work = bench.work
    for name, rule in PROFILES.items():
        (work / f"{name}.json").write_text(json.dumps({"rules": [rule]}))
    (work / "base.pth").unlink(missing_ok=True)
    if bench.cpu:
        make_shape(work / "base.pth", 7, 2, 64, 256, "cpu", head_size=32)
    else:
        (work / "base.pth").symlink_to(ROOT / "example" / "Quickstart" / "base.pth")
    make_texts(work, 600 if bench.cpu else 15000)
    scores = (
        "rm -rf pairs.tok && PY -m data.make_pairs --input pairs.jsonl --tokenizer bytes "
        "--output pairs.tok && PY -m data.make_reference --data pairs.tok --load_model base.pth"
    ).replace("PY", shlex.quote(sys.executable))
    scores += f" --dtype {'fp32' if bench.cpu else 'bf16'}"
    jobs = {"pairs": ["bash", "-c", scores]}
    module = [sys.executable, "-m", "tests.bench_strategies", "--work", str(work)]
    module += ["--device", "cpu" if bench.cpu else "gpu"]
    for size in sizes:
        if not (work / f"{size}.pth").exists():
            jobs[f"make-{size}"] = [*module, "shape", "--size", size]
    if ops and not bench.cpu:
        for name in ("FusedAdamBuilder", "CPUAdamBuilder"):
            code = (
                "from rwkv.training.strategy import _name_plain_architecture as name; name(); "
                f"from deepspeed.ops.op_builder import {name} as B; B().load(verbose=False)"
            )
            jobs[name] = [sys.executable, "-c", code]
    begun = time.monotonic()
    with ThreadPoolExecutor(len(jobs)) as pool:
        done = {
            name: pool.submit(bench.call, command, 240, log=name, gpus="0")
            for name, command in jobs.items()
        }
    for name, future in done.items():
        status, last = future.result()
        if status != 0:
            print(f"prepare: {name}: status {status}: {last}", flush=True)
    print(f"prepared in {time.monotonic() - begun:.0f} s", flush=True)


def make_texts(work: Path, count: int) -> None:
    """Instructions and pairs of the quickstart, and texts of 200 to 3,000 words."""
    if (work / "texts.jsonl").exists():
        return
    command = [sys.executable, str(ROOT / "example" / "Quickstart" / "make_data.py")]
    subprocess.run([*command, "--output", "data", "--rows", str(count)], cwd=work, check=True)
    rows = [json.loads(line) for line in (work / "data/train.jsonl").read_text().splitlines()]
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": other["completion"]}
        for r, other in zip(rows, rows[1:], strict=False)
        if r["completion"] != other["completion"]
    ]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    draw, words = random.Random(0), " ".join(r["completion"] for r in rows).split()
    with (work / "texts.jsonl").open("w") as file:
        for _ in range(1200):
            text = " ".join(draw.choices(words, k=draw.randint(200, 3000)))
            file.write(json.dumps({"text": text}) + "\n")


def make_shape(
    path: Path,
    version: int,
    layers: int,
    width: int,
    vocab: int,
    device: str,
    head_size: int = 64,
) -> None:
    """Write a model of random weights: norms are neutral, the rest is normal of width**-0.5."""
    import torch

    from rwkv.checkpoint import write_tensors
    from rwkv.config import RWKVConfig, default_ffn, default_ranks
    from rwkv.model import RWKV

    config = RWKVConfig(
        version=version,
        n_layer=layers,
        n_embd=width,
        dim_ffn=default_ffn(version, width),
        vocab_size=vocab,
        head_size=head_size,
        ranks=default_ranks(version, width),
    )
    torch.manual_seed(0)
    tensors = {}
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in RWKV(config).named_parameters()}
    for name, shape in shapes.items():
        value = torch.randn(shape, device=device, dtype=torch.bfloat16) * width**-0.5
        if ".ln" in name or name.startswith("ln_out"):
            value.fill_(name.endswith("weight"))
        tensors[name] = value.cpu()
    write_tensors(path, tensors)


def strategies_on_one(bench: Bench) -> None:
    """Each strategy is a process of its own; they share the card."""
    common = {"sft": 1, "layer_profile": "lora.json", "lr_init": 1e-3, "epoch_steps": 24}
    common["accumulate_grad_batches"] = 2
    if bench.cpu:
        common["epoch_steps"] = 6
    names = ["auto", *STAGES]
    with ThreadPoolExecutor(1 if bench.cpu else len(names)) as pool:
        for name in names:
            run = Run(f"one {name}", common | {"strategy": name})
            pool.submit(bench.start, f"one-{name}", [run], 1, 120, "0")
    want = [line["loss"] for line in bench.log("one auto")]
    rows = []
    for name in names:
        losses = [line["loss"] for line in bench.log(f"one {name}")]
        off = farthest(losses, want)
        shown = " ".join(f"{x:.4f}" for x in (*losses[:2], *losses[-2:]))
        rows.append([name, len(losses), shown, off, bench.error(f"one {name}")])
    bench.table(
        "LoRA on one GPU, the quickstart's model and data",
        ["Strategy", "Steps", "First two and last two losses", "Farthest from auto", "Error"],
        rows,
    )


def farthest(losses: list[float], want: list[float]) -> float | str:
    """The largest difference of two curves; their lengths if these are not the same."""
    if not losses or len(losses) != len(want):
        return f"{len(losses)} of {len(want)} steps"
    return max(abs(a - b) for a, b in zip(losses, want, strict=True))


def big(bench: Bench, size: str, strategy: str, devices: int, **more: Any) -> dict[str, Any]:
    """Flags of a run on a model of random weights."""
    return {
        "sft": 1,
        "load_model": f"{size}.pth",
        "train_data_file": "texts.jsonl",
        "strategy": strategy,
        "devices": devices,
        "ctx_len": 64 if bench.cpu else 4096,
        "lr_init": 1e-4,
        "tokenizer": "world",
    } | more


def median_speed(lines: list[dict]) -> float:
    speeds = [line["tokens_per_second"] for line in lines[min(4, len(lines) // 2) :]]
    return statistics.median(speeds) if speeds else 0.0


def speed_row(bench: Bench, name: str, label: list[Any]) -> list[Any]:
    lines = bench.log(name)
    ends = f"{lines[0]['loss']:.3f} to {lines[-1]['loss']:.3f}" if lines else ""
    speed = round(median_speed(lines))
    return [*label, len(lines), f"{speed:,}", bench.peaks(name), ends, bench.error(name)]


def speed_on_one(bench: Bench) -> None:
    """20 steps each, one after the other, in processes of their own."""
    rows = []
    for size, profile, micro in (
        ("1.5B", "lora64", 8),
        ("1.5B", "bone64", 8),
        ("1.5B-v6", "lora64", 2),
    ):
        name = f"speed {size} {profile}"
        flags = big(bench, size, "deepspeed_stage_2", 1, layer_profile=f"{profile}.json")
        steps = 3 if bench.cpu else 20
        micro = 2 if bench.cpu else micro
        bench.start(
            name.replace(" ", "-"),
            [Run(name, flags | {"micro_bsz": micro, "epoch_steps": steps})],
            1,
            110,
            "0",
        )
        rows.append(speed_row(bench, name, [size, profile, micro]))
    bench.table(
        "SFT under deepspeed_stage_2 on one GPU, rows of 4,096 tokens",
        ["Model", "Profile", "Micro batch", "Steps", "Tokens/s", "Peak GiB", "Loss", "Error"],
        rows,
    )


def equal_on_two(bench: Bench) -> None:
    """The same rows a step on one rank and on two; runs that stop half-way, for `resume`."""
    half = bench.steps // 2
    common = {"random_seed": 1, "warmup_steps": 2}
    one = {"accumulate_grad_batches": 2, "epoch_steps": 2 * bench.steps, "strategy": "auto"}
    two = {"devices": 2, "epoch_steps": bench.steps}
    first = MODES["SFT full"]

    def runs(strategy: str) -> list[Run]:
        more = common | (one if strategy == "auto" else two | {"strategy": strategy})
        listed = [Run(f"{m} {strategy}", bench.fitted(MODES[m]) | more) for m in bench.modes]
        return [*listed, Run(f"half {strategy}", first | more, half)]

    groups = {s: runs(s) for s in ("auto", DDP, *STAGES)}
    with ThreadPoolExecutor(1 if bench.cpu else len(groups)) as pool:
        for strategy, listed in groups.items():
            devices, gpus = (1, "0") if strategy == "auto" else (2, "0,1")
            pool.submit(bench.start, f"equal-{strategy}", listed, devices, 200, gpus)
    rows = []
    for mode in bench.modes:
        want = [line["loss"] for line in bench.log(f"{mode} auto")]
        for strategy in (DDP, *STAGES):
            name = f"{mode} {strategy}"
            losses = [line["loss"] for line in bench.log(name)]
            ends = f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else ""
            error = bench.error(name) or bench.error(f"{mode} auto")
            files = same_files(bench, name, f"{mode} auto")
            rows.append([mode, strategy, ends, farthest(losses, want), files, error])
    bench.table(
        f"Two GPUs against one with as many rows a step, {bench.steps} steps",
        ["Run", "Strategy", "Loss", "Farthest from one GPU", "Files", "Error"],
        rows,
    )
    print(f"\n{draw_losses(bench)}: the losses over each other", flush=True)


def draw_losses(bench: Bench) -> Path:
    """The losses of each run on one GPU and on two, laid over each other, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(bench.modes), figsize=(3.6 * len(bench.modes), 3.2), squeeze=False
    )
    for axis, mode in zip(axes[0], bench.modes, strict=True):
        for number, strategy in enumerate(("auto", DDP, *STAGES)):
            losses = [line["loss"] for line in bench.log(f"{mode} {strategy}")]
            label = "one GPU" if strategy == "auto" else f"two, {strategy}"
            axis.plot(
                range(1, len(losses) + 1), losses, label=label, linewidth=6 - number, alpha=0.6
            )
        axis.set_title(mode, fontsize=9)
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("loss, nats")
    axes[0][-1].legend(fontsize=6)
    picture = bench.work / "losses.png"
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    return picture


def same_files(bench: Bench, name: str, other: str) -> str:
    """Whether two runs wrote files of the same names, tensors and metadata; and how far apart."""
    from rwkv.checkpoint import read_metadata, read_tensors

    folders = [bench.work / "runs" / n for n in (name, other)]
    names = [sorted(p.name for p in folder.glob("*")) for folder in folders]
    if names[0] != names[1] or "rwkv-0.pth" not in names[0]:
        return f"{len(names[0])} and {len(names[1])} files"
    files = [read_tensors(folder / "rwkv-0.pth") for folder in folders]
    if {n: t.shape for n, t in files[0].items()} != {n: t.shape for n, t in files[1].items()}:
        return "tensors differ"
    metadata = [read_metadata(folder / "rwkv-0.pth") for folder in folders]
    if [set(m) for m in metadata] != [set(metadata[0])] * 2:
        return "metadata differs"
    apart = sum(float((files[0][n].float() - t.float()).norm() ** 2) for n, t in files[1].items())
    whole = sum(float(t.float().norm() ** 2) for t in files[1].values())
    return f"the same; weights {(apart / whole) ** 0.5:.1e} apart"


def resume_across(bench: Bench) -> None:
    """What two ranks began ends on one, and the other way round, against the whole runs."""
    first = MODES["SFT full"] | {"random_seed": 1, "warmup_steps": 2, "resume": 1}
    one = first | {"accumulate_grad_batches": 2, "epoch_steps": 2 * bench.steps}
    two = first | {"devices": 2, "epoch_steps": bench.steps}
    on_one, on_two = [], []
    for strategy in (DDP, *STAGES):
        copy(bench, f"half {strategy}", f"half {strategy} on one")
        on_one.append(Run(f"half {strategy} on one", one | {"strategy": "auto"}))
        copy(bench, "half auto", f"half auto on {strategy}")
        names = (f"half auto on {strategy}", f"half {strategy}")
        on_two.append([Run(name, two | {"strategy": strategy}) for name in names])
    with ThreadPoolExecutor(1 if bench.cpu else 6) as pool:
        pool.submit(bench.go_on, "resume-on-one", on_one, 1, 100, "0")
        for strategy, runs in zip((DDP, *STAGES), on_two, strict=True):
            pool.submit(bench.go_on, f"resume-on-{strategy}", runs, 2, 100, "0,1")
    want = [line["loss"] for line in bench.log("SFT full auto")]
    rows = []
    for run in (*on_one, *sum(on_two, [])):
        losses = [line["loss"] for line in bench.log(run.name)]
        rows.append([run.name, farthest(losses, want), bench.error(run.name)])
    bench.table(
        "Stopped half-way and resumed elsewhere, against one GPU without a stop",
        ["Run", "Farthest from one GPU", "Error"],
        rows,
    )


def copy(bench: Bench, name: str, to: str) -> None:
    source, target = bench.work / "runs" / name, bench.work / "runs" / to
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, target)


SPEED_CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # size, strategy, flags
    "1.5B full": ("1.5B", "deepspeed_stage_2", {"micro_bsz": 8, "epoch_steps": 12}),
    "7B LoRA over nf4": (
        "7B",
        DDP,
        {"micro_bsz": 4, "epoch_steps": 10, "layer_profile": "lora64-nf4.json"},
    ),
}


def speed_on_two(bench: Bench) -> None:
    """Tokens a second on one GPU and on two, each run alone on the machine."""
    cases = {name: SPEED_CASES[name] for name in bench.cases}
    if bench.cpu:
        small = {"micro_bsz": 2, "epoch_steps": 3}
        cases = {name: (size, how, more | small) for name, (size, how, more) in cases.items()}
    rows = []
    for name, (size, strategy, more) in cases.items():
        alone_by = "auto" if strategy == DDP else strategy
        for devices, by, gpus in ((1, alone_by, "0"), (2, strategy, "0,1")):
            run = Run(f"{name} on {devices}", big(bench, size, by, devices, **more))
            bench.start(run.name.replace(" ", "-"), [run], devices, 120, gpus)
        for devices in (1, 2):
            rows.append(speed_row(bench, f"{name} on {devices}", [name, strategy, devices]))
        alone = median_speed(bench.log(f"{name} on 1"))
        ratio = median_speed(bench.log(f"{name} on 2")) / alone if alone else 0.0
        rows.append([f"{name}: two GPUs / one", strategy, "", "", f"{ratio:.2f}", "", "", ""])
    bench.table(
        "Tokens a second, rows of 4,096 tokens",
        ["Model", "Strategy", "GPUs", "Steps", "Tokens/s", "Peak GiB", "Loss", "Error"],
        rows,
    )


def memory_on_two(bench: Bench) -> None:
    """Peak of each card by stage; what ZeRO-3 holds where a card has room for its share alone.

    Each run has processes of its own, for what one leaves behind would count for the next. They
    run beside each other: the peaks are of each process, the speeds say nothing.
    """
    few = {"micro_bsz": 1, "epoch_steps": 3}
    capped = {} if bench.cpu else {"gpu_memory": 14}
    lora = few | {"layer_profile": "lora.json"} | capped
    runs = [
        Run("7B LoRA, 14 GiB a card, deepspeed_stage_3", big(bench, "7B", STAGES[3], 2, **lora)),
        Run("7B LoRA, 14 GiB a card, ddp", big(bench, "7B", DDP, 2, **lora)),
        *(
            Run(f"1.5B, everything trains, {strategy}", big(bench, "1.5B", strategy, 2, **few))
            for strategy in (DDP, *STAGES)
        ),
    ]
    with ThreadPoolExecutor(1 if bench.cpu else 3) as pool:
        for number, run in enumerate(runs):
            pool.submit(bench.start, f"memory-{number}", [run], 2, 120, "0,1")
    rows = []
    for run in runs:
        _, steps, _, peaks, loss, error = speed_row(bench, run.name, [run.name])
        rows.append([run.name, steps, peaks, loss, error])
    bench.table(
        "Memory of each card, one row of 4,096 tokens",
        ["Run", "Steps", "Peak GiB by rank", "Loss", "Error"],
        rows,
    )


def death_on_two(bench: Bench) -> None:
    """Rank 1 is killed; what train.py says, how it ends, and whether the run can go on."""
    flags = MODES["SFT full"] | {"devices": 2, "strategy": DDP, "resume_every": 2, "resume": 1}
    run = Run("death", flags | {"epoch_steps": bench.steps, "random_seed": 1, "warmup_steps": 2})
    shutil.rmtree(bench.work / "runs" / run.name, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train.py"), *bench.words(run)]

    def kill() -> str:
        until = time.monotonic() + 80
        while len(bench.log("death")) < bench.steps // 2 and time.monotonic() < until:
            time.sleep(0.05)
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True)
        lines = [line.split(None, 2) for line in listed.stdout.splitlines() if "runs/death" in line]
        pids = {line[0] for line in lines}
        children = [int(pid) for pid, parent, _ in lines if parent in pids]
        for pid in children[:1]:
            os.kill(pid, signal.SIGKILL)
        return f"killed {children[:1]} at step {len(bench.log('death'))}"

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        begun = time.monotonic()
        status, last = bench.call(command, 100, log="death", gpus="0,1")
        seconds = time.monotonic() - begun
    rows = [["killed", killed.result(), status, f"{seconds:.0f} s: {last}"]]
    status, last = bench.call(command, 60, log="death", gpus="0,1")
    want = [line["loss"] for line in bench.log(f"SFT full {DDP}")]
    losses = [line["loss"] for line in bench.log("death")]
    rows.append(["resumed", f"{farthest(losses, want)} from ddp unharmed", status, last])
    bench.table("A rank that dies", ["Run", "What happened", "Status", "Last line"], rows)


PARTS = {
    "one": {"strategies": strategies_on_one, "speed": speed_on_one},
    "two": {
        "equal": equal_on_two,
        "speed": speed_on_two,
        "resume": resume_across,
        "death": death_on_two,
        "memory": memory_on_two,
    },
}
SIZES = {"one": ["1.5B", "1.5B-v6"], "two": ["1.5B", "7B"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("prepare", "one", "two", "shape"))
    parser.add_argument("--work", default="out/strategies", help="folder for data, models, runs")
    parser.add_argument("--only", default="", help="parts with commas: " + str(PARTS))
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), help="of `equal`; all")
    parser.add_argument("--cases", nargs="+", choices=tuple(SPEED_CASES), help="of `two`'s `speed`")
    parser.add_argument("--seconds", type=float, default=570, help="nothing goes on after these")
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--prepare", action="store_true", help="prepare first, in the same call")
    parser.add_argument("--size", default="", help="of `shape`, a model of random weights")
    parser.add_argument("--output", type=Path, help="the tables' rows, an object a line")
    options = parser.parse_args()
    bench = Bench(options)
    if options.what == "shape":
        version, layers, width = BIG[options.size]
        path, device = bench.work / f"{options.size}.pth", "cuda"
        if bench.cpu:
            layers, width, device = 2, 64, "cpu"
        make_shape(path, version, layers, width, 65536, device)
        return 0
    if options.what == "prepare" or options.prepare:
        sizes = SIZES.get(options.what) or sorted(BIG)
        prepare(bench, sizes, ops=True)
    for name, part in PARTS.get(options.what, {}).items():
        if options.only and name not in options.only.split(","):
            continue
        begun = time.monotonic()
        part(bench)
        print(f"\n({name}: {time.monotonic() - begun:.0f} s)", flush=True)
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in bench.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
