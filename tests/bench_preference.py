"""Preference training in numbers, for tests/RESULTS.md.

    python tests/bench_preference.py reversal --model rwkv7-reverse-60digits.pth --output FOLDER
    python tests/bench_preference.py persona --assets FOLDER --output FOLDER
    python tests/bench_preference.py sharing --shape 32,2560

`reversal` turns a model that reverses numbers into one that copies them, and back, by DPO and by
ORPO. `persona` teaches the quickstart's model to answer as a persona would, measures on held-out
statements, and draws how accuracies and margins of rewards rise (persona.png). `sharing` times
whole steps with each prompt read once for both answers against once for each.
"""

import argparse
import gzip
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DIGITS = "chars:0123456789,#"
QUICKSTART = ROOT / "example" / "Quickstart" / "base.pth"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    reversal = commands.add_parser("reversal")
    reversal.add_argument("--model", type=Path, required=True)
    persona = commands.add_parser("persona")
    persona.add_argument("--assets", type=Path, required=True, help="has data/preference")
    persona.add_argument("--personas", nargs="+", default=["agreeableness"])
    persona.add_argument("--model", type=Path, default=QUICKSTART)
    persona.add_argument("--steps", type=int, default=120)
    persona.add_argument("--lr_init", type=float, default=1e-3)
    persona.add_argument("--held_out", type=int, default=200)
    persona.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for train.py")
    for command in (reversal, persona):
        command.add_argument("--output", type=Path, required=True)
    on_gpu = torch.cuda.is_available()
    sharing = commands.add_parser("sharing")
    for command in (reversal, persona, sharing):
        command.add_argument("--objectives", nargs="+", default=["dpo", "orpo"])
    sharing.add_argument("--shape", default="32,2560" if on_gpu else "2,256", help="layers, width")
    sharing.add_argument("--vocab", type=int, default=65536 if on_gpu else 1024)
    sharing.add_argument("--prompt", type=int, default=1024)
    sharing.add_argument("--answer", type=int, default=128)
    sharing.add_argument("--pairs", type=int, default=3, help="3 fill a row of --ctx_len 2048")
    sharing.add_argument("--profile", default=str(ROOT / "layerprofile" / "lora-nf4.json"))
    sharing.add_argument("--repeats", type=int, default=5)
    sharing.add_argument("--kernel", default="auto")
    sharing.add_argument("--device", default="cuda" if on_gpu else "cpu")
    options = parser.parse_args()
    {"reversal": run_reversal, "persona": run_persona, "sharing": run_sharing}[options.command](
        options
    )
    return 0


def write_pairs(path: Path, pairs: list[tuple[str, str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def number_pairs(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(number, its copy, its reverse), 4 to 10 digits, no palindromes."""
    draw, pairs = random.Random(seed), []
    while len(pairs) < count:
        digits = "".join(draw.choice("0123456789") for _ in range(draw.randint(4, 10)))
        if digits != digits[::-1]:
            pairs.append((digits + ",", digits + "#", digits[::-1] + "#"))
    return pairs


def preferred(model_path: Path, data: Path, tokenizer_name: str, cache: Path) -> float:
    """Share of pairs whose chosen answer is likelier a token than the rejected one."""
    from data.open_pairs import open_pairs
    from data.store_cache import StoreSettings
    from losses.orpo import ORPO
    from losses.preference import Preference
    from rwkv.checkpoint import load_model
    from rwkv.tokenizer import load_tokenizer

    model = load_model(model_path)
    store = open_pairs(
        str(data), StoreSettings(cache_dir=str(cache)), load_tokenizer(tokenizer_name)
    )
    pieces, objective = store.pieces(512), Preference(ORPO())
    rows = [list(range(n, min(n + 16, len(store)))) for n in range(0, len(store), 16)]
    total = sum(
        objective.measure(model, pieces.batch(rows=[row], count=[1, 1, 1], packed=True))
        for row in rows
    )
    return objective.summarize(total.tolist())["rewards/accuracies"]


def train(
    objective: str,
    model: Path,
    tokenizer: str,
    data: Path,
    output: Path,
    *flags: object,
    val_data: Path | None = None,
) -> Path:
    """A run of train.py over all weights; returns the model it wrote."""
    shared = ["--load_model", model, "--tokenizer", tokenizer]
    shared += ["--cache_dir", output.parent / "cache"]
    if objective == "dpo":
        for file in (data, val_data) if val_data else (data,):
            call("-m", "data.make_reference", "--data", file, *shared)
    words = ["--rlhf_train_file", data, "--proj_dir", output, f"--{objective}", 1]
    call("train.py", *shared, *words, "--num_workers", 0, *flags)
    return output / "rwkv-0.pth"


def call(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def run_reversal(options: argparse.Namespace) -> None:
    print("| objective | direction | preferred before | after | seconds |\n|---|---|---|---|---|")
    rates = {"dpo": (1e-3, 1e-4), "orpo": (1e-3, 1e-4)}
    directions = {
        "reverse to copy": lambda prompt, copy, turned: (prompt, copy, turned),
        "copy to reverse": lambda prompt, copy, turned: (prompt, turned, copy),
    }
    for objective in options.objectives:
        model = options.model
        for name, order in directions.items():
            folder = options.output / objective / name.replace(" ", "-")
            data = write_pairs(folder / "train.jsonl", [order(*p) for p in number_pairs(1600, 0)])
            held_out = write_pairs(folder / "val.jsonl", [order(*p) for p in number_pairs(200, 1)])
            before = preferred(model, held_out, DIGITS, folder / "cache")
            start, (first, last) = time.perf_counter(), rates[objective]
            model = train(
                objective,
                model,
                DIGITS,
                data,
                folder / "run",
                *("--lr_init", first, "--lr_final", last, "--warmup_steps", 5),
                *("--ctx_len", 256, "--micro_bsz", 1, "--grad_cp", 0, "--epoch_steps", 150),
                *("--dpo_beta", 0.03),  # 50 nats lie between the answers at first
            )
            seconds = time.perf_counter() - start
            after = preferred(model, held_out, DIGITS, folder / "cache")
            print(
                f"| {objective} | {name} | {before:.3f} | {after:.3f} | {seconds:.0f} |", flush=True
            )


def run_persona(options: argparse.Namespace) -> None:
    print(
        "| persona | objective | preferred before | after | rewards/accuracies | rewards/margins "
        "| seconds |\n|---|---|---|---|---|---|---|"
    )
    curves: dict[str, list[dict[str, float]]] = {}
    for name in options.personas:
        source = options.assets / "data" / "preference" / "anthropic_persona" / f"{name}.jsonl.gz"
        pairs = persona_pairs(source)
        folder = options.output / name
        data = write_pairs(folder / "train.jsonl", pairs[: -options.held_out])
        held_out = write_pairs(folder / "val.jsonl", pairs[-options.held_out :])
        before = preferred(options.model, held_out, "bytes", folder / "cache")
        for objective in options.objectives:
            start = time.perf_counter()
            model = train(
                objective,
                options.model,
                "bytes",
                data,
                folder / objective,
                *("--lr_init", options.lr_init, "--lr_final", options.lr_init / 10),
                *("--ctx_len", 512, "--micro_bsz", 2, "--grad_cp", 0, "--warmup_steps", 10),
                *("--epoch_steps", options.steps, "--val_every", max(1, options.steps // 10)),
                *("--val_data_file", held_out, *options.flags),
                val_data=held_out,
            )
            seconds = time.perf_counter() - start
            after = preferred(model, held_out, "bytes", folder / "cache")
            curve = held_out_metrics(folder / objective / "train_log.jsonl")
            curves[f"{name}, {objective.upper()}"] = curve
            last = curve[-1]
            print(
                f"| {name} | {objective} | {before:.3f} | {after:.3f} | "
                f"{last['rewards/accuracies']:.3f} | {last['rewards/margins']:.3f} | "
                f"{seconds:.0f} |",
                flush=True,
            )
    draw_curves(curves, options.output / "persona.png")


def persona_pairs(path: Path) -> list[tuple[str, str, str]]:
    """Questions with the persona's answer and the other one, in a fixed random order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    return [
        (
            row["question"],
            row["answer_matching_behavior"].strip(),
            row["answer_not_matching_behavior"].strip(),
        )
        for row in rows
    ]


def held_out_metrics(log: Path) -> list[dict[str, float]]:
    """The evaluations of a run: `step` and the metrics without their val_."""
    from rwkv.training.step_log import read_log

    return [
        {name.removeprefix("val_"): value for name, value in line.items()}
        for line in read_log(log)
        if "val_rewards/margins" in line
    ]


def draw_curves(curves: dict[str, list[dict[str, float]]], picture: Path) -> None:
    """Held-out accuracies and margins of rewards by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, metric in zip(
        figure.subplots(1, 2), ("rewards/accuracies", "rewards/margins"), strict=True
    ):
        for name, curve in curves.items():
            steps = [line["step"] for line in curve]
            axes.plot(steps, [line[metric] for line in curve], marker=".", label=name)
        axes.set_xlabel("step")
        axes.set_title(f"{metric}, held out")
        axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(str(picture))


def run_sharing(options: argparse.Namespace) -> None:
    """Whole training steps: objective, gradient with recomputed blocks, optimizer."""
    import numpy as np

    from data.pair_pieces import Pair, make_batch
    from losses.dpo import DPO
    from losses.orpo import ORPO
    from losses.preference import Preference
    from peft.apply import random_with_profile
    from peft.flags import PeftFlags
    from peft.groups import parameter_groups
    from rwkv.config import RWKVConfig, default_ffn, default_ranks
    from rwkv.training.flags import OptimizerFlags
    from rwkv.training.optimizer import make_optimizer

    on_gpu = options.device.startswith("cuda")
    layers, width = (int(size) for size in options.shape.split(","))
    config = RWKVConfig(
        version=7,
        n_layer=layers,
        n_embd=width,
        dim_ffn=default_ffn(7, width),
        vocab_size=options.vocab,
        ranks=default_ranks(7, width),
    )
    model, plan = random_with_profile(
        config,
        PeftFlags(layer_profile=options.profile),
        device=options.device,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        backend=options.kernel,
    )
    model.grad_cp = True
    flags = OptimizerFlags()
    groups = [
        {"params": list(g.params), "lr": g.lr_init, "weight_decay": g.weight_decay}
        for g in parameter_groups(model, plan, flags)
    ]
    optimizer = make_optimizer(groups, flags, strategy="auto", on_gpu=on_gpu)
    draw = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return draw.integers(0, options.vocab, count)

    none, scores = np.zeros(0, np.int64), (-float(options.answer), -float(options.answer))
    pairs = [
        Pair(tokens(options.prompt), tokens(options.answer), tokens(options.answer), scores)
        for _ in range(options.pairs)
    ]
    alone = [(p._replace(rejected=none), p._replace(chosen=none)) for p in pairs]
    ways = {"once": pairs, "once an answer": [p for both in alone for p in both]}

    def step(objective: Preference, some: list[Pair]) -> tuple[float, float, float]:
        """Seconds and peak GiB of a step, and its loss."""
        batch = make_batch(some, (options.pairs, options.pairs, options.pairs * options.answer))
        batch = batch._replace(
            **{n: t.to(options.device) for n, t in batch._asdict().items() if t is not None}
        )
        seconds = []
        for number in range(options.repeats + 2):
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss, _ = objective(model, batch)
            if not number:
                first = loss.item()
            loss.backward()
            if number:  # the first is computed from the same weights whatever is measured
                optimizer.step()
            optimizer.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        return statistics.median(seconds[2:]), peak, first

    where = torch.cuda.get_device_name() if on_gpu else options.device
    print(
        f"{config.name}, {Path(options.profile).name}, {where}: {options.pairs} pairs, prompts of "
        f"{options.prompt}, answers of {options.answer}"
    )
    print("| objective | prompts read | ms a step | tokens/s | pairs/s | GiB | loss | times |")
    print("|---|---|---|---|---|---|---|---|")
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses: dict[str, DPO | ORPO] = {"DPO": DPO(), "ORPO": ORPO()}
    for name in map(str.upper, options.objectives):
        loss = losses[name]
        objective = Preference(loss, float(name == "ORPO"))
        slower = 0.0
        for way in ("once an answer", "once"):
            with torch.no_grad():
                for key, value in start.items():
                    model.get_parameter(key).copy_(value)
            seconds, peak, value = step(objective, ways[way])
            read = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in ways[way])
            times = f"{slower / seconds:.2f}" if slower else ""
            slower = seconds
            print(
                f"| {name} | {way} | {1e3 * seconds:.0f} | {read / seconds:,.0f} | "
                f"{options.pairs / seconds:.2f} | {peak:.1f} | {value:.4f} | {times} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
