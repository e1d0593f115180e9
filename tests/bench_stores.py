"""Storages beside each other: errors, products, training speed, memory.

    python -m tests.bench_stores products                 one layer's products, on a GPU
    python -m tests.bench_stores errors [--model FILE]    weights, outputs, logits, gradients
    python -m tests.bench_stores speed --shapes 7.2B      training steps, on a GPU
    python -m tests.bench_stores published                RWKV-PEFT's table of memory, on a GPU

The last two begin nothing more after 110 seconds (--seconds); `speed` wants one call a shape.
Weights are random numbers but for those of --model. Reserved memory is that of segments that grow,
as in training; with PYTORCH_ALLOC_CONF=expandable_segments:False it is that of torch's own way.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from peft import store_fp8
from peft.apply import load_frozen, random_with_profile
from peft.memory import GIB
from peft.store_bnb import BLOCK as FOUR_BIT_BLOCK
from peft.store_fpx import BLOCK as FLOAT_BLOCK
from peft.store_fpx import FORMATS
from peft.stores import STORES, make_store
from rwkv.config import RWKVConfig, default_ranks
from rwkv.linear import Linear
from rwkv.model import RWKV
from rwkv.training.strategy import grow_segments
from tests.bench_memory import Setting, config_of_shape, measured, peft_flags

PUBLISHED = {  # GB at ctx 1024, micro batch 1, LoRA of rank 64: (1.5B, 3B)
    "none": (5.6, 8.8),
    "int8": (4.6, 6.7),
    "nf4": (3.9, 5.7),
}
AIMS = {"none": 0.85, "int8": 0.8, "nf4": 0.7}  # ours over theirs
TIMED = ("none", "fp8", "int8", "nf4", "fp6", "fp5")


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """The median of `repeats` runs, after a few to warm up."""
    times = []
    for number in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def products(options: argparse.Namespace) -> None:
    """Time of each storage's product and of its parts where it has some."""
    out_features, in_features = options.sides
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) * 0.02
    x = torch.randn(options.tokens, in_features, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(options.tokens, out_features, device="cuda", dtype=torch.bfloat16)
    print(
        f"{torch.cuda.get_device_name()}: {list(weight.shape)}, {options.tokens} tokens, bfloat16"
    )
    print("storage     bits   error  forward ms  backward ms  output error  gradient error")
    exact, exact_grad = x @ weight.T, grad @ weight
    forward = milliseconds(lambda: x @ weight.T)
    backward = milliseconds(lambda: grad @ weight)
    print(f"{'none':<10}{16:6.2f}{0:8.4f}{forward:12.2f}{backward:13.2f}{0:14.4f}{0:16.4f}")
    for kind in STORES:
        store = make_store(kind, weight)
        error = relative(store.dense(torch.bfloat16), weight)
        wrong = relative(store.forward_product(x), exact)
        wrong_grad = relative(store.backward_product(grad), exact_grad)
        forward = milliseconds(lambda store=store: store.forward_product(x))
        backward = milliseconds(lambda store=store: store.backward_product(grad))
        bits = store.bytes() * 8 / weight.numel()
        print(
            f"{kind:<10}{bits:6.2f}{error:8.4f}{forward:12.2f}{backward:13.2f}{wrong:14.4f}"
            f"{wrong_grad:16.4f}"
        )
    codes, scale = store_fp8.to_e4m3(weight)
    x_codes, x_scale = store_fp8.to_e4m3(x)
    parts = {
        "round x": lambda: store_fp8.to_e4m3(x),
        "round grad": lambda: store_fp8.to_e4m3(grad, scale.T),
        "transpose": lambda: store_fp8._transposed(codes),
    }
    for fast in (False, True):
        parts[f"product{', fast sums' * fast}"] = lambda fast=fast: torch._scaled_mm(
            x_codes,
            codes.T,
            scale_a=x_scale,
            scale_b=scale.T,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )
    print("fp8 in parts: " + ", ".join(f"{n} {milliseconds(p):.3f} ms" for n, p in parts.items()))


def bound(kind: str, weight: torch.Tensor) -> float:
    """The largest relative error (root mean square) that the format allows for this weight.

    Whole numbers and 4-bit codes: half the widest gap times each row's or block's largest. Floats
    of M mantissa bits: 2^-(M+1) of the value, or half the step of the subnormal ones. Rounded
    scales are left out.
    """
    w = weight.float()
    size = w.square().mean().sqrt()
    if kind == "int8":
        return (w.abs().amax(dim=1).square().mean().sqrt() / 254 / size).item()
    if kind in ("nf4", "nf4_double", "fp4"):
        largest = w.reshape(-1, FOUR_BIT_BLOCK).abs().amax(dim=1)
        line = torch.linspace(-1, 1, 64 * FOUR_BIT_BLOCK).view(FOUR_BIT_BLOCK, 64).T.contiguous()
        line[:, -1] = 1  # so that every block has all codes at one scale
        gap = make_store(kind.removesuffix("_double"), line).dense(torch.float32).unique().diff()
        return (largest.square().mean().sqrt() * gap.max() / 2 / size).item()
    exponent, mantissa = FORMATS.get(kind, (4, 3))
    top = {"fp8": 448.0, "fp6": 28.0, "fp6_e2m3": 7.5, "fp5": 7.0}[kind]
    blocks = w if kind == "fp8" else w.reshape(-1, FLOAT_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / top
    smallest = 2.0 ** (1 - (2 ** (exponent - 1) - 1) - mantissa) * scale
    worst = torch.maximum(blocks.abs() * 2.0 ** -(mantissa + 1), smallest / 2)
    return (worst.square().mean().sqrt() / size).item()


def weights_of(model: RWKV | None, device: str) -> list[torch.Tensor]:
    """Linear weights to store: a model's, or Gaussian ones."""
    if model is None:
        draw = torch.Generator(device).manual_seed(0)
        return [torch.randn(512, 1024, generator=draw, device=device) * 0.02]
    found = [m.weight.detach() for m in model.blocks.modules() if isinstance(m, Linear)]
    return [w for w in found if w is not None and w.numel() % FLOAT_BLOCK == 0]


def errors(options: argparse.Namespace) -> None:
    """Errors of weights and outputs beside the bound, KL of a model's logits, gradient cosines."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (
        load_frozen(options.model, device=device, dtype=torch.float32) if options.model else None
    )
    name = Path(options.model).name if options.model else ""
    tokens = torch.randint(
        model.config.vocab_size if model else 2,
        (1, 256),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    exact = logits_of(model, tokens) if model else None
    print(f"{device}; root mean square, relative; bound: the most that the format allows")
    heads = ["random: weight", "bound", "output"]
    heads += [f"{name}: weight", "bound", "output", "KL nats", "top-1"] if model else []
    print(f"{'storage':<12}" + "".join(f"{head:>{max(len(head) + 2, 9)}}" for head in heads))
    for kind in STORES:
        cells = layer_errors(kind, weights_of(None, device))
        if model:
            cells += layer_errors(kind, weights_of(model, device))
            stored = load_frozen(options.model, device=device, dtype=torch.float32)
            for layer in stored.blocks.modules():
                if isinstance(layer, Linear) and layer.weight is not None:
                    layer.store_as(make_store(kind, layer.weight))
            found = logits_of(stored, tokens)
            kl = F.kl_div(
                found.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
            )
            cells += [kl.item(), (found.argmax(-1) == exact.argmax(-1)).float().mean().item()]
        shown = zip(cells, heads, strict=True)
        print(
            f"{kind:<12}" + "".join(f"{c:>{max(len(h) + 2, 9)}.4f}" for c, h in shown), flush=True
        )
    whole_models(options, device)


def layer_errors(kind: str, weights: list[torch.Tensor]) -> list[float]:
    """Means over the weights: relative error, bound, and error of the output of Gaussian input."""
    rows = []
    for weight in weights:
        store = make_store(kind, weight)
        x = torch.randn(256, weight.shape[1], device=weight.device)
        dense = store.dense(torch.float32)
        rows.append(
            (relative(dense, weight), bound(kind, weight), relative(x @ dense.T, x @ weight.T))
        )
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


@torch.no_grad()
def logits_of(model: RWKV, tokens: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens)[0])[0].float()


def whole_models(options: argparse.Namespace, device: str) -> None:
    """A random model over each storage: KL of its logits, cosine of the adapters' gradients."""
    layers, channels = options.layers, options.channels
    config = RWKVConfig(
        version=7,
        n_layer=layers,
        n_embd=channels,
        dim_ffn=4 * channels,
        vocab_size=options.vocabulary,
        ranks=default_ranks(7, channels),
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens = torch.randint(
        options.vocabulary, (1, options.tokens + 1), generator=torch.Generator().manual_seed(1)
    )

    def run(kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Log-probabilities [T, V], and the gradient of each adapter."""
        torch.manual_seed(2)
        setting = Setting("0.4B", quant=kind, limited=True, rank=16)
        model, _ = random_with_profile(config, peft_flags(setting), device=device, dtype=dtype)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for parameter in trained.values():  # both factors away from 0
            torch.nn.init.normal_(parameter, std=0.02)
        hidden = model(tokens[:, :-1].to(device))[0]
        found = model.logits(hidden)[0].float().log_softmax(-1)
        F.nll_loss(found, tokens[0, 1:].to(device)).backward()
        return found.detach(), {
            n: p.grad.float().flatten() for n, p in trained.items() if p.grad is not None
        }

    exact, want = run("none")
    print(
        f"whole models, {config.name}, random, LoRA of rank 16, {options.tokens} tokens, {dtype}:\n"
        f"{'storage':<12}  KL nats  top-1  cosine of gradients  least of a tensor"
    )
    for kind in STORES:
        found, got = run(kind)
        kl = F.kl_div(found, exact, log_target=True, reduction="batchmean").item()
        top = (found.argmax(-1) == exact.argmax(-1)).float().mean().item()
        whole = F.cosine_similarity(torch.cat([*got.values()]), torch.cat([*want.values()]), dim=0)
        least = min(F.cosine_similarity(got[n], want[n], dim=0).item() for n in want)
        print(f"{kind:<12}{kl:9.5f}{top:7.3f}{whole.item():21.4f}{least:19.4f}", flush=True)


def speed(options: argparse.Namespace) -> None:
    """Training steps of each storage, LoRA and Bone of rank 64 on all linear layers."""
    print(
        f"{torch.cuda.get_device_name()}: rank 64, {options.rows} x {options.ctx_len} tokens a "
        f"step, grad_cp, median of {options.steps - 1} steps"
    )
    print("shape  storage     adapter  tokens/s  to bf16  Bone/LoRA  peak GiB  reserved GiB")
    start = time.perf_counter()
    for shape in options.shapes.split(","):
        plain = 0.0
        for kind in options.stores.split(","):
            lora = 0.0
            for mode in ("lora", "bone"):
                if time.perf_counter() - start > options.seconds:
                    print(f"{options.seconds:.0f} s are over")
                    return
                setting = Setting(shape, mode, kind, rows=options.rows, ctx_len=options.ctx_len)
                try:
                    found = measured(setting, config_of_shape(shape), steps=options.steps)
                except RuntimeError as error:
                    print(f"{shape:<7}{kind:<12}{mode:<7}{str(error).splitlines()[0]}")
                    continue
                lora = found.seconds if mode == "lora" else lora
                plain = found.seconds if (mode, kind) == ("lora", "none") else plain
                rate = options.rows * options.ctx_len / found.seconds
                to_plain = f"{plain / found.seconds:.2f}" if plain and mode == "lora" else ""
                to_lora = f"{found.seconds / lora:.2f}" if lora and mode == "bone" else ""
                print(
                    f"{shape:<7}{kind:<12}{mode:<7}{rate:10,.0f}{to_plain:>9}{to_lora:>11}"
                    f"{found.peak / GIB:10.2f}{found.reserved / GIB:14.2f}",
                    flush=True,
                )


def published(options: argparse.Namespace) -> None:
    """Peaks at the settings of RWKV-PEFT's table, in its GB (2^30 bytes)."""
    print(f"{torch.cuda.get_device_name()}: LoRA of rank 64, 1 x 1,024 tokens, GiB")
    print("shape  storage  trains              peak  reserved  published  reserved/published  aim")
    start = time.perf_counter()
    variants = {
        "adapters": {"limited": True},
        "and offloads": {"limited": True, "offload": True},
        "and small layers": {"limited": False},
    }
    for kind in options.stores.split(","):
        numbers = PUBLISHED[kind]
        for shape, number in zip(("1.5B", "2.9B"), numbers, strict=True):
            for name, keys in variants.items():
                if time.perf_counter() - start > options.seconds:
                    print(f"{options.seconds:.0f} s are over")
                    return
                setting = Setting(shape, "lora", kind, ctx_len=1024, **keys)
                found = measured(setting, config_of_shape(shape))
                peak, reserved = found.peak / GIB, found.reserved / GIB
                print(
                    f"{shape:<7}{kind:<9}{name:<18}{peak:6.2f}{reserved:10.2f}{number:11.1f}"
                    f"{reserved / number:20.2f}{AIMS[kind]:5.2f}",
                    flush=True,
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    some = commands.add_parser("products", help=products.__doc__)
    some.add_argument("--tokens", type=int, default=8192)
    some.add_argument("--sides", type=int, nargs=2, default=(16384, 4096), help="out and in")
    some.set_defaults(run=products)
    some = commands.add_parser("errors", help=errors.__doc__)
    some.add_argument("--model", default="", help="a model with real weights")
    some.add_argument("--layers", type=int, default=24, help="of the model for gradients (0.4B's)")
    some.add_argument("--channels", type=int, default=1024)
    some.add_argument("--vocabulary", type=int, default=65536)
    some.add_argument("--tokens", type=int, default=512)
    some.set_defaults(run=errors)
    some = commands.add_parser("speed", help=speed.__doc__)
    some.add_argument("--shapes", default="1.5B,2.9B,7.2B")
    some.add_argument("--stores", default=",".join(TIMED), help="commas between; none is bfloat16")
    some.add_argument("--rows", type=int, default=2)
    some.add_argument("--ctx_len", type=int, default=4096)
    some.add_argument("--steps", type=int, default=4)
    some.set_defaults(run=speed)
    some = commands.add_parser("published", help=published.__doc__)
    some.add_argument("--stores", default=",".join(PUBLISHED), help="commas between")
    some.set_defaults(run=published)
    for name in ("speed", "published"):
        some = commands.choices[name]
        some.add_argument("--seconds", type=float, default=110.0, help="begin nothing after these")
    options = parser.parse_args()
    if torch.cuda.is_available():
        grow_segments()
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
