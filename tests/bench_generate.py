"""Speed of writing on a GPU, as a share of what its memory allows, and beside the package rwkv.

    python -m tests.bench_generate
    python -m tests.bench_generate --shape 12,768 --batches 1 256 --peer_seconds 0
    python -m tests.bench_generate --profile 1 256

Random weights in bfloat16. First table, a step of B rows that each write a token: milliseconds
with tokens drawn greedily, and drawn as data.make_rejected does (top_p 0.3, penalties), each from
a CUDA graph, and greedily without one; tokens a second of the graph; and the bound's share of its
time. The bound is the bytes that must move over the speed of a large copy, measured in the same
run: every weight but the embedding once, and each row's state, in float32, read and written. From
64 rows on our step writes the states only every fourth time (see rwkv.ops.decoding.Late); the bound
stays that of a step that always does, so that shares compare with those of other programs.

Second table, prompts a minute: `generate` over --prompts prompts of --prompt_tokens, each
continued by --tokens, tokens drawn as above, prompts read included; and the package rwkv (see
tests/parity_rwkv.py for where it must lie) with one prompt after the other, the likeliest token
each time, which costs it least. It runs for --peer_seconds in a process of its own; with
--peer_cuda 1 with its own CUDA kernels, which it compiles first.

With --profile ROWS .. instead, where the time of a drawn step of so many rows goes: the kernels of
one replay of its graph, with how often each ran, its microseconds in all, and its share of their
sum. Lanes overlap, so the sum may exceed the time of the step, which stands below it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from peft.apply import random_with_profile
from peft.flags import PeftFlags
from rwkv import cli
from rwkv.checkpoint import write_tensors
from rwkv.config import RWKVConfig, default_ffn, default_ranks
from rwkv.decoder import Decoder, Picker
from rwkv.generate import generate
from rwkv.model import RWKV
from rwkv.sampling_flags import GREEDY, Sampling
from tests.bench_wkv import copy_speed
from tests.parity_rwkv import PeerSpeed, time_peer

DRAWN = Sampling(top_p=0.3, presence_penalty=0.3, frequency_penalty=0.3)


def moved_bytes(model: RWKV, rows: int) -> tuple[int, int]:
    """Bytes of the weights that a step reads, and of the states that it reads and writes."""
    weights = sum(p.nbytes for name, p in model.named_parameters() if name != "emb.weight")
    config = model.config
    wkv = config.n_head * config.head_size**2 * 4
    shifts = 2 * config.n_embd * model.emb.weight.element_size()
    return weights, 2 * rows * config.n_layer * (wkv + shifts)


def step_milliseconds(
    model: RWKV, rows: int, sampling: Sampling, *, captured: bool, steps: int
) -> tuple[float, bool]:
    """A step's time, the median of five stretches, and whether it was captured."""
    decoder = Decoder(model, Picker(model, sampling, 0, None, rows), rows)
    decoder._capturable &= captured
    decoder.run(4)
    times = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        decoder.run(steps)
        synchronize()
        times.append(1e3 * (time.perf_counter() - start) / steps)
    return statistics.median(times), decoder.graph is not None


def profile_step(model: RWKV, rows: int, sampling: Sampling) -> str:
    """A table of the kernels of one step, those that take longest first."""
    from torch.profiler import ProfilerActivity, profile

    decoder = Decoder(model, Picker(model, sampling, 0, None, rows), rows)
    decoder.run(4)
    synchronize()
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        decoder.run(1)
        synchronize()
    found_times = [
        (event.self_device_time_total or event.self_cpu_time_total, event.count, event.key)
        for event in found.key_averages()
    ]
    total = sum(time for time, _, _ in found_times)
    lines = ["| kernel | count | us | share |", "|---|---|---|---|"]
    for time_, count, name in sorted(found_times, reverse=True)[:40]:
        lines.append(f"| {name[:90]} | {count} | {time_:,.0f} | {time_ / total:.1%} |")
    step, _ = step_milliseconds(model, rows, sampling, captured=True, steps=16)
    lines.append(f"sum {total:,.0f} us, a step {1e3 * step:,.0f} us")
    return "\n".join(lines)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peer_speed(model: RWKV, options: argparse.Namespace) -> PeerSpeed:
    """How fast the package rwkv is with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        write_tensors(path, {name: p.detach().cpu() for name, p in model.named_parameters()})
        return time_peer(
            path,
            prompt_tokens=options.prompt_tokens,
            tokens=options.tokens,
            seconds=options.peer_seconds,
            strategy="cuda bf16" if options.device == "cuda" else "cpu fp32",
            own_kernels=bool(options.peer_cuda),
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench_generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", default="24,2048", help="layers and channels")
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=16, help="in a stretch that is timed")
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--peer_seconds", type=float, default=10.0, help="0 for no comparison")
    parser.add_argument("--peer_cuda", type=int, default=0)
    parser.add_argument("--profile", type=int, nargs="+", metavar="ROWS")
    options = parser.parse_args(argv)
    options.device = "cuda" if on_gpu else "cpu"
    layers, width = (int(size) for size in options.shape.split(","))
    config = RWKVConfig(
        version=7,
        n_layer=layers,
        n_embd=width,
        dim_ffn=default_ffn(7, width),
        vocab_size=options.vocabulary,
        ranks=default_ranks(7, width),
    )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model, _ = random_with_profile(config, PeftFlags(), device=options.device, dtype=dtype)
    model.requires_grad_(False).eval()
    if options.profile:
        for rows in options.profile:
            print(f"{rows} rows\n{profile_step(model, rows, DRAWN)}\n", flush=True)
        return 0
    speed = copy_speed(options.device) if on_gpu else 1e7
    name = torch.cuda.get_device_name() if on_gpu else "CPU, its bound made up"
    print(f"{config.name}, {name}, a large copy moves {speed / 1e6:,.0f} GB/s")
    print("| rows | GB a step | bound ms | graph ms | drawn ms | no graph ms | tokens/s | share |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in options.batches:
        weights, states = moved_bytes(model, rows)
        bound = (weights + states) / speed
        greedy, captured = step_milliseconds(
            model, rows, GREEDY, captured=True, steps=options.steps
        )
        drawn, _ = step_milliseconds(model, rows, DRAWN, captured=True, steps=options.steps)
        plain, _ = step_milliseconds(model, rows, GREEDY, captured=False, steps=4)
        print(
            f"| {rows} | {(weights + states) / 1e9:.2f} | {bound:.2f} | {greedy:.2f} | {drawn:.2f} "
            f"| {plain:.2f} | {1e3 * rows / greedy:,.0f} | {bound / greedy:.0%}, "
            f"drawn {bound / drawn:.0%} |" + ("" if captured or not on_gpu else " not captured")
        )
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        options.vocabulary, (options.prompts, options.prompt_tokens), generator=draw
    ).tolist()
    if on_gpu:  # the kernels of reading are compiled, as in a run of hours
        generate(model, prompts[: options.batch_size], max_tokens=1, batch_size=options.batch_size)
    synchronize()
    start = time.perf_counter()
    found = generate(
        model, prompts, max_tokens=options.tokens, sampling=DRAWN, batch_size=options.batch_size
    )
    seconds = time.perf_counter() - start
    assert all(len(answer.tokens) == options.tokens for answer in found)
    ours = 60 * options.prompts / seconds
    print(f"\nprompts of {options.prompt_tokens} tokens, answers of {options.tokens}")
    print("| | prompts | seconds | prompts a minute | times |\n|---|---|---|---|---|")
    print(
        f"| ours, {options.batch_size} rows | {options.prompts} | {seconds:.1f} | {ours:,.0f} | |"
    )
    if options.peer_seconds > 0:
        peer = peer_speed(model, options)
        each = peer.read + peer.wrote
        print(
            f"| rwkv, one at a time | {peer.answers} | {each * peer.answers:.1f} | "
            f"{60 / each:,.1f} | {ours * each / 60:,.0f} |\n"
            f"rwkv: {peer.read:.2f} s to read a prompt, "
            f"{1e3 * peer.wrote / (options.tokens - 1):.2f} ms a token"
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
