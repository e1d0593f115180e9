"""Distillation in numbers.

    python tests/bench_distill.py reversal --model rwkv7-reverse-60digits.pth --output FOLDER
    python tests/bench_distill.py speed

`reversal` trains students of half the teacher's width from nothing, with the same first weights and
the same texts ("123,321#", 1 to 20 digits, scored whole, as language models are trained): one from
the texts alone, the others from the teacher's top-k scores of them, at each of --mixes
(ALPHA:TEMPERATURE, as train.py has them). The texts are few, so that a student of them alone learns
them by heart. A table of steps against exact answers to 400 held-out numbers, the mean over
--seeds, and the step from which on at least 95% are exact, in the mean and for each seed. All run
beside each other, --jobs at a time, each on one thread.

`speed` has a 7B-shape teacher score random texts (k = 50) and a 1.5B-shape student learn from the
scores, both with random weights on one GPU; tokens a second and peak memory of each, in a minute.
`--device cpu` with small sizes tries it out.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

DIGITS = "chars:0123456789,#"
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    reversal = commands.add_parser("reversal")
    reversal.add_argument("--model", type=Path, required=True)
    reversal.add_argument("--output", type=Path, required=True)
    reversal.add_argument("--steps", type=int, default=4000)
    reversal.add_argument("--every", type=int, default=200, help="steps between counts")
    reversal.add_argument("--texts", type=int, default=1500)
    reversal.add_argument("--scored", choices=("whole", "answers"), default="whole")
    reversal.add_argument("--tokens", type=int, default=1024, help="of a step")
    reversal.add_argument("--rate", type=float, default=1e-2)
    reversal.add_argument("--head_size", type=int, default=0, help="of the students; the teacher's")
    reversal.add_argument("--seeds", type=int, nargs="+", default=(1,))
    reversal.add_argument("--mixes", nargs="+", default=("0:4",))
    reversal.add_argument("--jobs", type=int, default=2)
    speed = commands.add_parser("speed")
    speed.add_argument("--teacher", type=int, nargs=2, default=(32, 4096), help="layers, width")
    speed.add_argument("--student", type=int, nargs=2, default=(24, 2048), help="layers, width")
    speed.add_argument("--vocab", type=int, default=65536)
    speed.add_argument("--text", type=int, default=4096, help="tokens of a text")
    speed.add_argument("--texts", type=int, default=4, help="texts of a step")
    speed.add_argument("--steps", type=int, default=5)
    speed.add_argument("--quant", default="", help="storage of the teacher, such as nf4")
    speed.add_argument("--device", default="cuda")
    options = parser.parse_args()
    {"reversal": run_reversal, "speed": run_speed}[options.command](options)
    return 0


def run_reversal(options: argparse.Namespace) -> None:
    from rwkv.checkpoint import config_of, read_tensors

    options.output.mkdir(parents=True, exist_ok=True)
    data, held_out = options.output / "numbers.jsonl", numbers(400, 1)
    rows = [
        {"text": f"{number},{number[::-1]}#"}
        if options.scored == "whole"
        else {"prompt": f"{number},", "completion": f"{number[::-1]}#"}
        for number in numbers(options.texts, 0)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ["--tokenizer", DIGITS, "--template", "plain"]
    shared += ["--cache_dir", options.output / "cache"]
    scores = options.output / "scores"
    temperatures = sorted({float(mix.partition(":")[2]) for mix in options.mixes})
    begin = time.perf_counter()
    words = ["--load_model", options.model, "--data", data, "--output", scores, "--top_k", 10]
    call("-m", "data.make_teacher", *words, "--temperature", *temperatures, *shared)
    print(f"scores: {time.perf_counter() - begin:.0f} s", flush=True)

    teacher = config_of(read_tensors(options.model))
    sizes = ["--my_testing", "x070", "--n_layer", teacher.n_layer, "--n_embd", teacher.n_embd // 2]
    sizes += ["--head_size_a", options.head_size or teacher.head_size]
    schedule = ["--epoch_steps", options.every, "--epoch_count", options.steps // options.every]
    schedule += ["--epoch_save", 1, "--lr_init", options.rate, "--lr_final", options.rate / 20]
    schedule += ["--lr_schedule", "cosine", "--warmup_steps", 20]
    batches = ["--ctx_len", options.tokens, "--micro_bsz", 1, "--num_workers", 0]
    students = {"texts": ["--sft", 1, "--train_data_file", data]}
    for mix in options.mixes:
        alpha, _, temperature = mix.partition(":")
        students[f"alpha {alpha}, T {temperature}"] = [
            *("--distillation", 1, "--alpha", alpha, "--temperature", temperature),
            *("--train_data_file", scores),
        ]

    def curve(job: tuple[str, int]) -> list[float]:
        """Shares of exact answers, at every save."""
        name, seed = job
        folder = options.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        flags = [*students[name], *sizes, *shared, *schedule, *batches, "--random_seed", seed]
        flags += ["--l2wrap", 0, "--grad_cp", 0, "--precision", "fp32", "--accelerator", "cpu"]
        call("train.py", *flags, "--proj_dir", folder)
        saves = range(options.steps // options.every)
        return [exact(folder / f"rwkv-{number}.pth", held_out) for number in saves]

    begin = time.perf_counter()
    jobs = [(name, seed) for seed in options.seeds for name in students]
    with ThreadPoolExecutor(options.jobs) as pool:
        curves = dict(zip(jobs, pool.map(curve, jobs), strict=True))
    print(f"{len(jobs)} students: {time.perf_counter() - begin:.0f} s\n")
    means = {
        name: [
            sum(at) / len(at) for at in zip(*(curves[name, s] for s in options.seeds), strict=True)
        ]
        for name in students
    }
    print("| step |", " | ".join(means), "|")
    print("|---" * (1 + len(means)) + "|")
    for row, values in enumerate(zip(*means.values(), strict=True), start=1):
        print(f"| {row * options.every} |", " | ".join(f"{value:.1%}" for value in values), "|")
    reached = [reaches(mean, options.every) for mean in means.values()]
    print("| 95% from |", " | ".join(reached), "|")
    alone = [
        ", ".join(reaches(curves[name, s], options.every) for s in options.seeds) for name in means
    ]
    print("| each seed |", " | ".join(alone), "|")


def reaches(curve: list[float], every: int) -> str:
    """The step from which a curve stays at 95% and above."""
    there = [n for n in range(len(curve)) if min(curve[n:]) >= 0.95]
    return str((there[0] + 1) * every) if there else "-"


def numbers(count: int, seed: int) -> list[str]:
    """Numbers of 1 to 20 digits."""
    draw = random.Random(seed)
    return ["".join(draw.choices("0123456789", k=draw.randint(1, 20))) for _ in range(count)]


def call(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def exact(path: Path, some: list[str]) -> float:
    """Share of numbers that the model, always writing the likeliest token, reverses."""
    from rwkv.checkpoint import load_model
    from rwkv.generate import generate
    from rwkv.sampling_flags import Sampling
    from rwkv.tokenizer import load_tokenizer

    model, tokenizer = load_model(path).requires_grad_(False), load_tokenizer(DIGITS)
    written = generate(
        model,
        [tokenizer.encode(f"{number},") for number in some],
        tokenizer=tokenizer,
        max_tokens=22,
        stop=["#"],
        sampling=Sampling(temperature=0.0),
        batch_size=len(some),
    )
    right = [a.text.removesuffix("#") == n[::-1] for a, n in zip(written, some, strict=True)]
    return sum(right) / len(right)


def run_speed(options: argparse.Namespace) -> None:
    from bench_infctx import random_model

    from data.make_teacher import top_k_scores
    from data.teacher_store import Scores
    from losses.distill import Distillation, Divergence
    from rwkv.batch import TeacherBatch
    from rwkv.reading import read_texts

    on_gpu = options.device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)

    def sized(shape: list[int], quant: str) -> argparse.Namespace:
        layers, width = shape
        return argparse.Namespace(
            **{"layers": layers, "width": width, "head_size": 64, "vocab": options.vocab},
            **{"version": 7, "adapter": "lora", "rank": 32, "quant": quant, "quant_head": False},
            **{"kernel": "auto", "state": False, "grad_cp": 1, "device": options.device},
        )

    T, Q = options.text, options.texts
    tokens = torch.randint(options.vocab, (Q, T + 1))
    texts = tokens[:, :-1].tolist()

    def score() -> list[Scores]:
        """What data.make_teacher keeps of all texts."""
        teacher, _ = random_model(sized(options.teacher, options.quant), dtype)
        teacher.requires_grad_(False)

        def run() -> list[Scores]:
            with torch.no_grad():
                return [
                    top_k_scores(teacher.logits(hidden), 50, [2.0])
                    for piece in read_texts(teacher, texts, piece=max(T, 4096))
                    for hidden in piece.hidden.split(1024)
                ]

        made = run()
        report("scores", run, Q * T, options.steps, on_gpu)
        return made

    ids, values, lse = (
        torch.cat([torch.from_numpy(part) for part in parts])
        for parts in zip(
            *((s.ids.view("int16"), s.values.view("int16"), s.lse[2.0]) for s in score()),
            strict=True,
        )
    )
    home = tokens.to(options.device)
    batch = TeacherBatch(
        inputs=home[:, :-1].reshape(1, -1),
        targets=home[:, 1:].reshape(1, -1),
        mask=torch.ones(1, Q * T, dtype=torch.bool, device=options.device),
        cu_seqlens=torch.arange(0, Q * T + 1, T, device=options.device),
        count=torch.tensor(Q * T, device=options.device),
        ids=ids.unsqueeze(0).to(options.device),
        values=values.unsqueeze(0).to(options.device),
        lse=lse.float().view(torch.int32).unsqueeze(0).to(options.device),
    )
    student, optimizer = random_model(sized(options.student, ""), dtype)
    objective = Distillation(Divergence("forward", 2.0))

    def learn() -> None:
        loss, _ = objective(student, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert loss.isfinite()

    learn()
    report("training", learn, Q * T, options.steps, on_gpu)


def report(name: str, run: Callable[[], object], tokens: int, steps: int, on_gpu: bool) -> None:
    """Print tokens a second and peak memory of some calls."""
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        run()
    if on_gpu:
        torch.cuda.synchronize()
    rate = steps * tokens / (time.perf_counter() - begin)
    peak = f", peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB" if on_gpu else ""
    print(f"{name}: {rate:,.0f} tokens/s{peak}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
