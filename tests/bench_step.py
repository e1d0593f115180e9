"""Speed and memory of whole training steps on a GPU, as a table beside other trainers' figures.

    python -m tests.bench_step
    python -m tests.bench_step --only lora-1.5B-8 full-1.5B-8 --steps 8
    python -m tests.bench_step --profile lora-1.5B-8

A step is what train.py does for one optimizer step, without Lightning, data and clipping: the SFT
objective on random tokens (every token scored, vocabulary 65,536, 4,096 tokens a row), its
gradient with --grad_cp 1 (rows that end in -kept: 0; in -selective: selective; in -graph: as a CUDA
graph, all of it under "forward"; in -fla: wkv by flash-linear-attention, which compiles for minutes
and runs only when named), and fused AdamW with float32 masters. The model is bfloat16 with random
weights.

Columns: tokens a second (median step); milliseconds of forward, backward, optimizer; TFLOP/s of
the model and its share of 989 TFLOP/s (an H100's dense bfloat16); peak GiB, of a graph with the
steps that come before it; seconds of the first step, in which what no cache has is compiled; the
loss, which shows whether numbers are finite; other trainers' tokens a second and GiB, and ours over
theirs.
FLOPs of a token, recomputation not counted:

    trained in full   6 (matrices + head) + 27 head_size C layers
    adapters          4 (matrices + head) + 6 adapter parameters + 27 head_size C layers

where matrices are all two-dimensional parameters of the blocks and the last term is the wkv7
operator, 9 head_size a channel and token forward and twice that backward (that of wkv6 takes less,
1% of all).
"""

import argparse
import json
import pkgutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

import peft
import rwkv.ops
from losses.sft import SFT
from peft.apply import apply_profile
from peft.flags import PeftFlags
from peft.groups import parameter_groups
from peft.plan import Plan
from peft.registry import ADAPTERS
from rwkv import cli
from rwkv.batch import TokenBatch
from rwkv.config import RWKVConfig, default_ffn, default_ranks
from rwkv.errors import InputError
from rwkv.model import RWKV
from rwkv.training.flags import OptimizerFlags
from rwkv.training.graphed import GraphedSteps
from rwkv.training.optimizer import make_optimizer

PEAK = 989e12  # an H100 SXM's dense bfloat16 products, FLOP/s, from NVIDIA's data sheet
WARM_UP = 2


@dataclass(frozen=True)
class Row:
    """One line of the table.

    mode: full, or an adapter on every linear layer of the blocks.
    small: norms and small vectors train beside the adapters, as without --limited_lora.
    grad_cp: as --grad_cp.
    kept: GiB, as --grad_cp_memory.
    offload: --grad_cp_offload.
    graph: --cuda_graphs.
    kernel: --kernel.
    """

    mode: str
    n_layer: int
    n_embd: int
    rows: int
    version: int = 7
    small: bool = True
    tokens: int = 4096
    vocabulary: int = 65536
    grad_cp: bool | str = True
    kept: float = 0.0
    offload: bool = False
    graph: bool = False
    kernel: str = "auto"

    def config(self) -> RWKVConfig:
        return RWKVConfig(
            version=self.version,
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            dim_ffn=default_ffn(self.version, self.n_embd),
            vocab_size=self.vocabulary,
            head_size=64,
            ranks=default_ranks(self.version, self.n_embd),
        )


SMALLER, LARGER = (24, 2048), (32, 2560)
ROWS = {
    "full-1.5B-8": Row("full", *SMALLER, rows=8),
    "full-1.5B-1": Row("full", *SMALLER, rows=1),
    "full-1.5B-1-graph": Row("full", *SMALLER, rows=1, graph=True),
    "full-1.5B-8-graph": Row("full", *SMALLER, rows=8, graph=True),
    "full-2.9B-8": Row("full", *LARGER, rows=8),
    "lora-1.5B-8": Row("lora", *SMALLER, rows=8),
    "lora-1.5B-8-fla": Row("lora", *SMALLER, rows=8, kernel="fla"),
    "lora-only-1.5B-8": Row("lora", *SMALLER, rows=8, small=False),
    "lora-1.5B-8-graph": Row("lora", *SMALLER, rows=8, graph=True),
    "lora-1.5B-1": Row("lora", *SMALLER, rows=1),
    "lora-1.5B-1-graph": Row("lora", *SMALLER, rows=1, graph=True),
    "lora-1.5B-1-kept": Row("lora", *SMALLER, rows=1, grad_cp=False),
    "full-1.5B-8-selective": Row("full", *SMALLER, rows=8, grad_cp="selective"),
    "lora-1.5B-8-selective": Row("lora", *SMALLER, rows=8, grad_cp="selective"),
    "lora-1.5B-1-selective": Row("lora", *SMALLER, rows=1, grad_cp="selective"),
    "lora-1.5B-8-host": Row("lora", *SMALLER, rows=8, offload=True),
    "lora-1.5B-8-host-kept": Row(
        "lora", *SMALLER, rows=8, offload=True, grad_cp="selective", kept=6.7
    ),
    "lora-1.5B-8-host-kept-graph": Row(
        "lora", *SMALLER, rows=8, offload=True, grad_cp="selective", kept=6.7, graph=True
    ),
    "lora-2.9B-4": Row("lora", *LARGER, rows=4),
    "lora-only-2.9B-4": Row("lora", *LARGER, rows=4, small=False),
    "lora-2.9B-4-host": Row("lora", *LARGER, rows=4, offload=True),
    "lora-2.9B-4-graph": Row("lora", *LARGER, rows=4, graph=True),
    "lora-2.9B-4-host-kept": Row(
        "lora", *LARGER, rows=4, offload=True, grad_cp="selective", kept=0.5
    ),
    "lora-2.9B-4-host-kept-graph": Row(
        "lora", *LARGER, rows=4, offload=True, grad_cp="selective", kept=0.5, graph=True
    ),
    "lora-2.9B-1": Row("lora", *LARGER, rows=1),
    "lora-2.9B-1-graph": Row("lora", *LARGER, rows=1, graph=True),
    "bone-1.5B-8": Row("bone", *SMALLER, rows=8),
    "bone-1.5B-1": Row("bone", *SMALLER, rows=1),
    "lora-rwkv6-1.6B-8": Row("lora", *SMALLER, rows=8, version=6),
    "lora-rwkv6-3B-4": Row("lora", *LARGER, rows=4, version=6),
}
RANK = 64

# Tokens a second and peak GiB, measured on one H100 with each trainer's own model code and CUDA
# kernels: random tokens, 4,096 a row, recomputed blocks, no Lightning or DeepSpeed. Full:
# RWKV-LM's RWKV-v7/train_temp (its fastest kernel, float32 masters at 1.5B, bfloat16 AdamW at
# 2.9B). LoRA of rank 64 on all six projections: RWKV-PEFT, and RWKV-LM-RLHF.
PEERS: dict[str, dict[str, tuple[int, float]]] = {
    "full-1.5B-8": {"RWKV-LM": (32385, 37.2)},
    "full-2.9B-8": {"RWKV-LM": (17370, 30.2)},
    "lora-1.5B-8": {"RWKV-PEFT": (19832, 22.6), "RLHF": (17364, 22.8)},
    "lora-only-1.5B-8": {"RWKV-PEFT": (19832, 22.6), "RLHF": (17364, 22.8)},
    "lora-2.9B-4": {"RWKV-PEFT": (9676, 16.8), "RLHF": (8819, 17.2)},
}
PEERS |= {
    "full-1.5B-8-selective": PEERS["full-1.5B-8"],
    "lora-1.5B-8-selective": PEERS["lora-1.5B-8"],
    "lora-1.5B-8-host": PEERS["lora-1.5B-8"],
    "lora-1.5B-8-host-kept": PEERS["lora-1.5B-8"],
    "lora-only-2.9B-4": PEERS["lora-2.9B-4"],
    "lora-2.9B-4-host": PEERS["lora-2.9B-4"],
    "lora-1.5B-8-graph": PEERS["lora-1.5B-8"],
    "lora-2.9B-4-graph": PEERS["lora-2.9B-4"],
    "lora-2.9B-4-host-kept": PEERS["lora-2.9B-4"],
    "lora-2.9B-4-host-kept-graph": PEERS["lora-2.9B-4"],
    "lora-1.5B-8-host-kept-graph": PEERS["lora-1.5B-8"],
    "full-1.5B-8-graph": PEERS["full-1.5B-8"],
}


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a step's parts, FLOPs of a token, peak bytes, and the last loss.

    first: seconds of the first step, in which kernels are compiled or found in caches.
    """

    first: float
    forward: float
    backward: float
    optimizer: float
    step: float
    flops: float
    peak: int
    loss: float


def random_model(row: Row, device: str, dtype: torch.dtype) -> RWKV:
    """A model whose weights are drawn where they lie: norms as new, all else small and random."""
    with torch.device("meta"):
        model = RWKV(row.config(), row.kernel).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, last = name.rpartition(".")
            if isinstance(model.get_submodule(module), nn.LayerNorm | nn.GroupNorm):
                parameter.fill_(1.0 if last == "weight" else 0.0)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.5 * max(parameter.shape) ** -0.5)
            else:
                parameter.normal_(std=0.1)
    return model


def adapt(model: RWKV, row: Row) -> Plan:
    """Apply the row's profile."""
    if row.mode == "full":
        return apply_profile(model, PeftFlags())
    rule = {"match": "blocks.*", "mode": row.mode, "rank": RANK}
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder, f"{row.mode}.json")
        profile.write_text(json.dumps({"rules": [rule]}))
        return apply_profile(
            model, PeftFlags(layer_profile=str(profile), limited_lora=not row.small)
        )


def flops_of_token(row: Row, model: RWKV) -> float:
    """By the formula at the top of this file."""
    with torch.device("meta"):
        bare = RWKV(row.config())
    matrices = sum(p.numel() for p in bare.blocks.parameters() if p.ndim == 2)
    head = row.vocabulary * row.n_embd
    wkv = 27 * 64 * row.n_embd * row.n_layer
    if row.mode == "full":
        return 6.0 * (matrices + head) + wkv
    adapters = [m for m in model.modules() if isinstance(m, tuple(ADAPTERS.values()))]
    own = sum(getattr(m, part).numel() for m in adapters for part in m.PARTS)
    return 4.0 * (matrices + head) + 6.0 * own + wkv


class Clock:
    """Times between marks: by events on a GPU, so that nothing waits, else by the wall."""

    def __init__(self, device: str):
        self.on_gpu = device.startswith("cuda")
        self.marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Of each interval; call it once the device is done."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) if self.on_gpu else 1e3 * (b - a) for a, b in pairs]


class Training:
    """A model in training on one batch that comes again and again."""

    def __init__(self, row: Row, device: str):
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.row, self.device = row, device
        self.model = random_model(row, device, dtype)
        plan = adapt(self.model, row)
        self.model.grad_cp, self.model.grad_cp_offload = row.grad_cp, row.offload
        self.model.grad_cp_memory = int(row.kept * 2**30)
        self.model.train()
        flags = OptimizerFlags()
        groups = [
            {"params": list(g.params), "lr": g.lr_init, "weight_decay": g.weight_decay}
            for g in parameter_groups(self.model, plan, flags)
        ]
        on_gpu = device.startswith("cuda")
        self.optimizer = make_optimizer(groups, flags, strategy="auto", on_gpu=on_gpu)
        self.objective = SFT()
        self.graphs = GraphedSteps(self.model, self.objective) if row.graph else None
        self.batch = self.random_batch(row, device)

    @staticmethod
    def random_batch(row: Row, device: str) -> TokenBatch:
        """Rows of random tokens, all of them scored."""
        tokens = torch.randint(row.vocabulary, (row.rows, row.tokens + 1), device=device)
        return TokenBatch(
            tokens[:, :-1],
            tokens[:, 1:],
            torch.ones(row.rows, row.tokens, dtype=torch.bool, device=device),
            None,
            torch.tensor(row.rows * row.tokens, device=device),
            torch.arange(row.rows * row.tokens, device=device),
        )

    def step(self) -> tuple[Clock, torch.Tensor]:
        clock = Clock(self.device)
        clock.mark()
        run = partial(self.objective, self.model) if self.graphs is None else self.graphs
        loss, _ = run(self.batch)
        clock.mark()
        loss.backward()
        clock.mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.mark()
        return clock, loss.detach()


@contextmanager
def emptied(device: str) -> Iterator[None]:
    """Give memory back behind a row, whatever became of it."""
    try:
        yield
    finally:
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def measure(row: Row, device: str, steps: int) -> Measured:
    """Train for WARM_UP + `steps` steps."""
    training = Training(row, device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    training.step()[1].item()
    first = time.perf_counter() - begin
    for _ in range(WARM_UP - 1):
        training.step()
    if on_gpu:
        torch.cuda.synchronize()
        if not row.graph:  # whose memory is handed out while it is recorded, never when replayed
            torch.cuda.reset_peak_memory_stats()
    done = [training.step() for _ in range(steps)]
    if on_gpu:
        torch.cuda.synchronize()
    parts = [clock.milliseconds() for clock, _ in done]
    forward, backward, optimizer = (statistics.median(part) for part in zip(*parts, strict=True))
    return Measured(
        first,
        forward,
        backward,
        optimizer,
        statistics.median(sum(part) for part in parts),
        flops_of_token(row, training.model),
        torch.cuda.max_memory_allocated() if on_gpu else 0,
        done[-1][1].item(),
    )


def line(name: str, row: Row, found: Measured) -> str:
    """A row of the table."""
    speed = 1e3 * row.rows * row.tokens / found.step
    teraflops = speed * found.flops / 1e12
    peers = "; ".join(
        f"{who} {tokens:,} {gib} GiB: x{speed / tokens:.2f}"
        for who, (tokens, gib) in PEERS.get(name, {}).items()
    )
    return (
        f"{name:27} {speed:8,.0f} {found.forward:8.1f} {found.backward:9.1f} "
        f"{found.optimizer:6.1f} {teraflops:8.1f} {1e12 * teraflops / PEAK:6.1%} "
        f"{found.peak / 2**30:6.1f} {found.first:8.1f} {found.loss:7.3f}  {peers}"
    )


def groups_of_kernels() -> dict[str, str]:
    """The group of each Triton kernel of rwkv/ops and peft by its name."""
    from triton.runtime import KernelInterface

    groups = {}
    modules = [
        *pkgutil.iter_modules(rwkv.ops.__path__, "rwkv.ops."),
        *pkgutil.iter_modules(peft.__path__, "peft."),
    ]
    for module in modules:
        if "triton" not in module.name:
            continue
        short = module.name.removeprefix("rwkv.ops.")
        group = "wkv" if short.startswith(("wkv7_triton", "wkv6_triton")) else "fused"
        group = "head" if short.startswith("logit_scores") else group
        group = "adapters and stores" if short.startswith("peft.") else group
        for name, value in vars(import_module(module.name)).items():
            if isinstance(value, KernelInterface):
                groups[name] = group
    return groups


def group_of(kernel: str, ours: dict[str, str]) -> str:
    """GEMM, wkv, fused, head, adapters and stores, optimizer, copies or other element-wise."""
    low = kernel.lower()
    if kernel in ours:
        return ours[kernel]
    if any(word in low for word in ("nvjet", "gemm", "cutlass", "splitk", "xmma")):
        return "GEMM"
    if "wkv" in low:
        return "wkv"
    if "multi_tensor" in low or "adam" in low:
        return "optimizer"
    if low.startswith(("memcpy", "memset")):
        return "copies"
    return "other element-wise"


def profile(row: Row, device: str, top: int = 25) -> None:
    """Print a step by groups of kernels, and its dearest kernels."""
    training = Training(row, device)
    for _ in range(WARM_UP):
        training.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        training.step()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    runs: Counter[str] = Counter()
    for event in recorded.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time_total / 1e3
            runs[event.name] += 1
    ours, groups = groups_of_kernels(), defaultdict(float)
    for name, spent in times.items():
        groups[group_of(name, ours)] += spent
    whole = sum(times.values())
    print(f"kernels of one step: {whole:.1f} ms")
    for group, spent in sorted(groups.items(), key=lambda item: -item[1]):
        print(f"{spent:9.2f} ms {spent / whole:6.1%}  {group}")
    print()
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:top]:
        print(f"{spent:9.2f} ms {spent / whole:6.1%} x{runs[name]:5}  {name[:110]}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[name for name, row in ROWS.items() if row.kernel == "auto"],
        metavar="NAME",
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--rows", type=int, help="rows of a batch, instead of the name's")
    parser.add_argument("--profile", metavar="NAME", help="print one row's step by kernel")
    flags = parser.parse_args()
    for name in [*flags.only, *([flags.profile] if flags.profile else [])]:
        if name not in ROWS:
            raise InputError(f"{name}: is no row; known are {', '.join(ROWS)}")
    if not torch.cuda.is_available():
        raise InputError("bench_step: needs a GPU, and torch sees none")
    device = "cuda"
    if flags.profile:
        profile(ROWS[flags.profile], device)
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        "FLOPs of a token: full 6 (matrices + head) + w, adapters 4 (matrices + head) + 6 of "
        "their own + w; w = 27 head_size C layers; MFU of 989 TFLOP/s"
    )
    print(
        "row                         tokens/s  forward  backward    opt  TFLOP/s    MFU    GiB"
        "  first s    loss  others: tokens/s, GiB, ours over theirs"
    )
    for name in flags.only:
        row = ROWS[name] if flags.rows is None else replace(ROWS[name], rows=flags.rows)
        with emptied(device):
            try:
                print(line(name, row, measure(row, device, flags.steps)), flush=True)
            except Exception as error:  # the other rows are worth having
                print(f"{name:27} {type(error).__name__}: {str(error)[:300]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
