"""Distillation in numbers.

    python tests/bench_distill.py reversal --model rwkv7-reverse-60digits.pth --output FOLDER
    python tests/bench_distill.py speed

`reversal` trains students of half the teacher's width from nothing, from one seed on the same
texts ("123,321#", 1 to 20 digits, all tokens scored): one from the texts alone, one from the
teacher's top-k scores of them. A table of steps against exact answers to 400 held-out numbers, and
the step from which at least 95% are exact.

`speed` has a 7B-shape teacher score random texts (k = 50) and a 1.5B-shape student learn from the
scores, both with random weights on one GPU; tokens a second and peak memory of each, in a minute.
`--device cpu` with small sizes tries it out.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
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
    reversal.add_argument("--steps", type=int, default=1600)
    reversal.add_argument("--every", type=int, default=100, help="steps between counts")
    reversal.add_argument("--texts", type=int, default=20000)
    reversal.add_argument("--tokens", type=int, default=1024, help="of a step")
    reversal.add_argument("--rate", type=float, default=1e-2)
    reversal.add_argument("--seed", type=int, default=1)
    reversal.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    reversal.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
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


STUDENTS = {  # what each learns from, as flags of train.py
    "texts": ["--sft", 1, "--l2wrap", 0, "--mask_prompt", 0],
    "teacher": ["--distillation", 1, "--alpha", 0, "--temperature", 1, "--l2wrap", 0],
}


def run_reversal(options: argparse.Namespace) -> None:
    from rwkv.checkpoint import config_of, read_tensors

    options.output.mkdir(parents=True, exist_ok=True)
    data, held_out = options.output / "numbers.jsonl", numbers(400, 1)
    rows = [
        {"prompt": f"{number},", "completion": f"{number[::-1]}#"}
        for number in numbers(options.texts, 0)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ["--tokenizer", DIGITS, "--template", "plain"]
    shared += ["--cache_dir", options.output / "cache"]
    scores = options.output / "scores"
    if not scores.exists():
        words = ["--load_model", options.model, "--data", data, "--output", scores, "--top_k", 10]
        words += ["--temperature", 1, "--mask_prompt", 0, *shared]
        call("-m", "data.make_teacher", *words)
    teacher = config_of(read_tensors(options.model))
    sizes = ["--my_testing", "x070", "--n_layer", teacher.n_layer, "--n_embd", teacher.n_embd // 2]
    sizes += ["--head_size_a", teacher.head_size // 2]
    curves: dict[str, list[float]] = {}
    for name in options.students:
        begin, folder = time.perf_counter(), options.output / f"from-{name}"
        words = [*sizes, *shared, *STUDENTS[name]]
        words += ["--train_data_file", scores if name == "teacher" else data]
        words += ["--ctx_len", options.tokens, "--micro_bsz", 1, "--accelerator", options.device]
        words += ["--epoch_steps", options.every, "--epoch_count", options.steps // options.every]
        words += ["--epoch_save", 1, "--lr_init", options.rate, "--lr_final", options.rate / 10]
        words += ["--lr_schedule", "cosine", "--warmup_steps", 20, "--random_seed", options.seed]
        words += ["--grad_cp", 0, "--num_workers", 0, "--precision", "fp32"]
        call("train.py", *words, "--proj_dir", folder)
        curves[name] = [
            exact(folder / f"rwkv-{epoch}.pth", held_out, options.device)
            for epoch in range(options.steps // options.every)
        ]
        print(f"from the {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    print("| step |", " | ".join(f"from the {name}" for name in curves), "|")
    print("|---" * (1 + len(curves)) + "|")
    for row, values in enumerate(zip(*curves.values(), strict=True), start=1):
        print(f"| {row * options.every} |", " | ".join(f"{value:.1%}" for value in values), "|")
    for name, curve in curves.items():
        there = [n for n in range(len(curve)) if min(curve[n:]) >= 0.95]
        reached = f"from step {(there[0] + 1) * options.every}" if there else "not reached"
        print(f"95% exact from the {name}: {reached}")


def numbers(count: int, seed: int) -> list[str]:
    """Numbers of 1 to 20 digits."""
    draw = random.Random(seed)
    return ["".join(draw.choices("0123456789", k=draw.randint(1, 20))) for _ in range(count)]


def call(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def exact(path: Path, some: list[str], device: str) -> float:
    """Share of numbers that the model, always writing the likeliest token, reverses."""
    from rwkv.checkpoint import load_model
    from rwkv.generate import generate
    from rwkv.sampling_flags import Sampling
    from rwkv.tokenizer import load_tokenizer

    model = load_model(path, device="cuda" if device == "gpu" else "cpu").requires_grad_(False)
    tokenizer = load_tokenizer(DIGITS)
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
