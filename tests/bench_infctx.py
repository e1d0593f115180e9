"""Memory and speed of training on long texts, by length, gradient and place of the states.

A table from 4k to 1M tokens, on one GPU:

    python tests/bench_infctx.py --layers 12 --width 768

A 14B-shape model in nf4 on 24 GiB, at 65,536 tokens and at the longest text that still fits:

    python tests/bench_infctx.py --layers 61 --width 4096 --quant nf4 --memory_gib 24 \\
        --lengths 65536 --modes exact+host --longest

Weights are random and quantized as they are made; a step is loss, gradient, clipping and AdamW.
`--device cpu` tries the command out (the memory column is the process's largest).
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
    "exact": (False, False),
    "exact+host": (False, True),
    "truncated": (True, False),
    "truncated+host": (True, True),
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
    model.grad_cp = True
    groups = [
        {"params": list(group.params), "lr": 1e-5, "weight_decay": 0.0}
        for group in parameter_groups(model, plan, OptimizerFlags())
    ]
    on_gpu = options.device != "cpu"
    optimizer = make_optimizer(groups, OptimizerFlags(), strategy="auto", on_gpu=on_gpu)
    print(f"{config.name}, {trained_count(plan):,} parameters train, {options.quant or dtype}")
    return model, optimizer


def step(model: RWKV, optimizer: object, T: int, plan: ChunkPlan | None) -> float:
    """Seconds of a training step over one text of T random tokens."""
    device = model.emb.weight.device
    tokens = torch.randint(model.config.vocab_size, (1, T + 1), device=device)
    mask = torch.ones(1, T, dtype=torch.bool, device=device)
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, None, torch.tensor(T, device=device))
    start = time.perf_counter()
    loss, _ = SFT(chunks=plan)(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert loss.isfinite(), "the loss is not finite"
    return time.perf_counter() - start


def measure(
    model: RWKV, optimizer: object, T: int, mode: str, chunk: int
) -> tuple[float, float] | None:
    """(peak GiB, tokens a second) of a step; None where memory does not suffice."""
    plan = None if mode == "whole" else ChunkPlan(chunk, *MODES[mode])
    gc.collect()
    on_gpu = model.emb.weight.is_cuda
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = step(model, optimizer, T, plan)
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        return None
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak / GIB, T / seconds


def report(model: RWKV, optimizer: object, T: int, mode: str, chunk: int) -> bool:
    """Print the line of one measurement; whether it fitted."""
    found = measure(model, optimizer, T, mode, chunk)
    numbers = "out of memory" if found is None else f"{found[0]:9.3f}  {found[1]:12,.0f}"
    print(f"{T:>10,}  {mode:<15}{numbers}", flush=True)
    return found is not None


def longest(model: RWKV, optimizer: object, mode: str, chunk: int, T: int, limit: int) -> int:
    """The longest text that fits, up to `limit`: doubled until one does not, then halved in."""
    fits, fails = 0, 0
    while not fails and fits < limit:
        if report(model, optimizer, T, mode, chunk):
            fits, T = T, min(2 * T, limit)
        else:
            fails = T
    while fails - fits > max(chunk, fits // 16):
        middle = (fits + fails) // 2 // chunk * chunk
        if report(model, optimizer, middle, mode, chunk):
            fits = middle
        else:
            fails = middle
    return fits


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and speed of training on long texts.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--version", type=int, choices=(6, 7), default=7)
    parser.add_argument("--adapter", choices=("lora", "bone", "miss", "dora"), default="lora")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--state", action="store_true", help="tune the initial state too")
    parser.add_argument("--quant", default="", help="storage of frozen weights, such as nf4")
    parser.add_argument("--quant_head", action="store_true", help="store the head so too")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--modes", nargs="+", choices=("whole", *MODES), default=tuple(MODES))
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--memory_gib", type=float, default=0, help="what the GPU is to have")
    parser.add_argument("--longest", action="store_true", help="search the longest text that fits")
    parser.add_argument("--limit", type=int, default=2**24, help="of that search, in tokens")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()

    torch.manual_seed(0)
    on_gpu = options.device != "cpu"
    if on_gpu and options.memory_gib:
        free, total = torch.cuda.mem_get_info()
        context = total - free  # what CUDA itself took counts against the budget
        torch.cuda.set_per_process_memory_fraction((options.memory_gib * GIB - context) / total)
        print(f"budget {options.memory_gib:g} GiB, {context / GIB:.2f} of it CUDA's own")
    if on_gpu:
        print(torch.cuda.get_device_name())
    model, optimizer = random_model(options, torch.bfloat16 if on_gpu else torch.float32)
    report(model, optimizer, options.chunk, options.modes[0], options.chunk)  # warms up
    print(f"\n    tokens  mode            peak GiB  tokens/second   (chunks of {options.chunk:,})")
    for T in options.lengths:
        for mode in options.modes:
            report(model, optimizer, T, mode, options.chunk)
    if options.longest:
        mode = options.modes[-1]
        start = max(options.lengths)
        found = longest(model, optimizer, mode, options.chunk, start, options.limit)
        print(f"longest with {mode}: {found:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
