"""Memory and speed of training on long texts, by length, gradient and place of the states.

A table from 4k to 1M tokens, on one GPU, in two minutes or less:

    python tests/bench_infctx.py --layers 24 --width 1024 --seconds 110

A 14B-shape model in nf4 on 24 GiB, at 65,536 tokens and at the longest text that still fits:

    python tests/bench_infctx.py --layers 61 --width 4096 --quant nf4 --quant_head \\
        --memory_gib 24 --lengths 65536 --modes exact+host exact --longest --seconds 300

Weights are random and quantized as they are made; a step is loss, gradient, clipping and AdamW.
A measurement that would not end within --seconds of the first is left out and named. `--device
cpu` tries the command out (the memory column is the process's largest).
"""

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from losses.sft import SFT
from peft.apply import install, mark_trained
from peft.flags import PeftFlags
from peft.groups import parameter_groups
from peft.plan import make_plan, trained_count
from peft.tuned_state import add_tuned_state
from rwkv.batch import TokenBatch
from rwkv.checkpoint import set_parameter
from rwkv.chunks import ChunkPlan
from rwkv.config import RWKVConfig, default_ffn, default_ranks
from rwkv.model import RWKV
from rwkv.training.flags import OptimizerFlags
from rwkv.training.optimizer import make_optimizer

GIB = 2**30
LENGTHS = (4096, 16384, 65536, 262144, 1048576)
MODES = {  # name -> (truncated, states in host memory); "whole" walks no chunks
    "exact+host": (False, True),
    "exact": (False, False),
    "truncated+host": (True, True),
    "truncated": (True, False),
}


def random_model(options: argparse.Namespace, dtype: torch.dtype) -> tuple[RWKV, object]:
    """A model of random weights, each quantized as soon as it is made, and its optimizer."""
    config = RWKVConfig(
        version=options.version,
        n_layer=options.layers,
        n_embd=options.width,
        dim_ffn=default_ffn(options.version, options.width),
        vocab_size=options.vocab,
        head_size=options.head_size,
        ranks=default_ranks(options.version, options.width),
    )
    rule = {"match": "blocks.*", "mode": options.adapter, "rank": options.rank}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as profile:
        json.dump({"rules": [{**rule, "train_small": False}]}, profile)
        profile.flush()
        quant = {"quant": True, "quant_mode": options.quant} if options.quant else {}
        flags = PeftFlags(layer_profile=profile.name, quant_head=options.quant_head, **quant)
        with torch.device("meta"):
            model = RWKV(config, options.kernel)
            plan = make_plan(model, flags)
    layer_of = {p: name for name, layer in plan.layers.items() for p in layer.parameters}
    for name, parameter in list(model.named_parameters()):
        value = torch.randn(parameter.shape, device=options.device, dtype=dtype)
        value *= options.width**-0.5
        if ".ln" in name or name.startswith("ln_out"):
            value.fill_(name.endswith("weight"))
        set_parameter(model, name, value)
        install(model, layer_of[name], plan)
    mark_trained(model, plan)
    if options.state:
        add_tuned_state(model)
    model.grad_cp = bool(options.grad_cp)
    groups = [
        {"params": list(group.params), "lr": 1e-5, "weight_decay": 0.0}
        for group in parameter_groups(model, plan, OptimizerFlags())
    ]
    on_gpu = options.device != "cpu"
    optimizer = make_optimizer(groups, OptimizerFlags(), strategy="auto", on_gpu=on_gpu)
    print(f"{config.name}, {trained_count(plan):,} parameters train, {options.quant or dtype}")
    return model, optimizer


class Bench:
    """One model, its optimizer, and what was measured of them.

    rates: tokens a second of each mode's last step.
    peaks: bytes, by mode and length.
    """

    def __init__(self, options: argparse.Namespace):
        self.chunk, self.seconds = options.chunk, options.seconds
        self.on_gpu = options.device != "cpu"
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.model, self.optimizer = random_model(options, dtype)
        self.rates: dict[str, float] = {}
        self.peaks: dict[tuple[str, int], int] = {}
        self.start = time.perf_counter()

    def step(self, T: int, plan: ChunkPlan | None) -> None:
        """A training step over one text of T random tokens."""
        model, device = self.model, self.model.device
        tokens = torch.randint(model.config.vocab_size, (1, T + 1), device=device)
        mask = torch.ones(1, T, dtype=torch.bool, device=device)
        batch = TokenBatch(
            tokens[:, :-1], tokens[:, 1:], mask, None, torch.tensor(T, device=device)
        )
        loss, _ = SFT(chunks=plan)(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert loss.isfinite(), "the loss is not finite"  # waits for the GPU

    def measure(self, T: int, mode: str) -> bool:
        """Print the line of one step; whether it fitted. Not run if the time does not suffice."""
        begin = time.perf_counter()
        left = self.seconds - (begin - self.start)
        wanted = T / self.rates[mode] if mode in self.rates else 0.0
        if wanted > left:
            print(f"{T:>10,}  {mode:<15}not run: would take {wanted:.0f} s", flush=True)
            return False
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        try:
            self.step(T, None if mode == "whole" else ChunkPlan(self.chunk, *MODES[mode]))
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            print(f"{T:>10,}  {mode:<15}out of memory", flush=True)
            return False
        self.rates[mode] = rate = T / (time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else resident()
        self.peaks[mode, T] = peak
        print(f"{T:>10,}  {mode:<15}{peak / GIB:9.3f}  {rate:12,.0f}", flush=True)
        return True

    def growth(self, mode: str) -> None:
        """Print how much the peak grows from 65,536 tokens to the longest text measured."""
        at = {T: peak for (m, T), peak in self.peaks.items() if m == mode and T >= 65536}
        if len(at) > 1:
            first, last = min(at), max(at)
            more = at[last] / at[first] - 1
            print(f"{mode}: peak at {last:,} tokens is {more:+.2%} of that at {first:,}")

    def longest(self, mode: str, budget: float, state_bytes: int) -> None:
        """Estimate the longest text from two lengths, and try it.

        Args:
            mode: of MODES.
            budget: bytes that the process may take of the GPU.
            state_bytes: of one state between chunks.
        """
        if (mode, 2 * self.chunk) not in self.peaks:
            self.measure(2 * self.chunk, mode)
        known = sorted(T for m, T in self.peaks if m == mode)
        if len(known) < 2:
            return
        short, long = known[0], known[-1]
        slope = (self.peaks[mode, long] - self.peaks[mode, short]) / (long - short)
        room = 0.98 * budget - self.peaks[mode, long]  # the rest is lost between blocks
        if room <= 0 or slope <= 0:
            print(f"{mode}: {room / GIB:.2f} GiB are left, {slope:,.1f} bytes a token: no estimate")
            return
        T = int(long + room / slope) // self.chunk * self.chunk
        print(f"{mode}: {slope:,.1f} bytes of GPU memory a token; {T:,} tokens would fit")
        if MODES[mode][1]:
            print(f"{mode}: {state_bytes / self.chunk:,.0f} bytes of host memory a token")
        if not self.measure(T, mode) and T / self.rates[mode] < self.seconds:
            self.measure(int(0.9 * T) // self.chunk * self.chunk, mode)


def resident() -> int:
    """The largest memory that the process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and speed of training on long texts.")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--version", type=int, choices=(6, 7), default=7)
    parser.add_argument("--adapter", choices=("lora", "bone", "miss", "dora"), default="lora")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--state", action="store_true", help="tune the initial state too")
    parser.add_argument("--quant", default="", help="storage of frozen weights, such as nf4")
    parser.add_argument("--quant_head", action="store_true", help="store head and embedding so too")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--modes", nargs="+", choices=("whole", *MODES), default=tuple(MODES))
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument(
        "--grad_cp",
        type=int,
        choices=(0, 1),
        default=1,
        help="0: in the backward pass keep all activations of a chunk, which saves a third run",
    )
    parser.add_argument("--memory_gib", type=float, default=0, help="what the GPU is to have")
    parser.add_argument("--longest", action="store_true", help="search the longest text that fits")
    parser.add_argument("--seconds", type=float, default=1e9, help="that all may take")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()

    torch.manual_seed(0)
    budget = 0.0
    if options.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        context = total - free  # what CUDA itself took counts against the budget
        budget = (options.memory_gib * GIB or total) - context
        torch.cuda.set_per_process_memory_fraction(budget / total)
        print(
            f"{torch.cuda.get_device_name()}, {(budget + context) / GIB:.2f} GiB, "
            f"{context / GIB:.2f} of it CUDA's own"
        )
    bench = Bench(options)
    print(f"\n    tokens  mode            peak GiB  tokens/second   (chunks of {options.chunk:,})")
    for _ in range(2):  # the first one compiles
        bench.measure(2 * options.chunk, options.modes[0])
    bench.start = time.perf_counter()
    for mode in options.modes:
        for T in options.lengths:
            bench.measure(T, mode)
        bench.growth(mode)
    if options.longest and budget:
        state = sum(x.nbytes for layer in bench.model.initial_state(1) for x in layer)
        for mode in options.modes:
            bench.longest(mode, budget, state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
