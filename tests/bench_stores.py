"""Storages beside each other: errors, products, training speed, memory.

    python -m tests.bench_stores products                 one layer's products, on a GPU
    python -m tests.bench_stores errors [--model FILE]    weights, outputs, logits, gradients
    python -m tests.bench_stores speed --shapes 7.2B      training steps, on a GPU
    python -m tests.bench_stores published                RWKV-PEFT's table of memory, on a GPU
    python -m tests.bench_stores load --stores nf4        a quantized file beside its model

The last three begin nothing more after 110 seconds (--seconds); `speed` wants one call a shape.
Weights are random numbers but for those of --model; of these, the first table leaves out weights
that are all zeros, as in blocks that a model does not use. Reserved memory is that of segments that
grow, as in training; with PYTORCH_ALLOC_CONF=expandable_segments:False it is that of torch's own
way.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import math
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from peft import quantize, store_bnb
from peft.apply import load_frozen, load_with_profile, new_with_profile, random_with_profile
from peft.flags import PeftFlags
from peft.memory import GIB
from peft.store_fpx import BLOCK as FLOAT_BLOCK
from peft.store_fpx import FORMATS
from peft.store_rows import RowStore, rounded_rows, transposed
from peft.stores import STORES, make_store
from rwkv.checkpoint import write_tensors
from rwkv.config import RWKVConfig, default_ranks
from rwkv.linear import Linear, Matrix
from rwkv.model import RWKV
from rwkv.training.strategy import grow_segments
from tests.bench_memory import Setting, config_of_shape, measured, peft_flags
from tests.bench_wkv import milliseconds

PUBLISHED = {  # GB at ctx 1024, micro batch 1, LoRA of rank 64: (1.5B, 3B)
    "none": (5.6, 8.8),
    "int8": (4.6, 6.7),
    "nf4": (3.9, 5.7),
}
AIMS = {"none": 0.85, "int8": 0.8, "nf4": 0.7}  # ours over theirs


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of a run, as the other benches measure them."""
    return milliseconds(run, "cuda" if torch.cuda.is_available() else "cpu", 20)


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
    forward = timed(lambda: x @ weight.T)
    backward = timed(lambda: grad @ weight)
    print(f"{'none':<10}{16:6.2f}{0:8.4f}{forward:12.2f}{backward:13.2f}{0:14.4f}{0:16.4f}")
    for kind in STORES:
        store = make_store(kind, weight)
        error = relative(store.dense(torch.bfloat16), weight)
        wrong = relative(store.forward_product(x), exact)
        wrong_grad = relative(store.backward_product(grad), exact_grad)
        forward = timed(lambda store=store: store.forward_product(x))
        backward = timed(lambda store=store: store.backward_product(grad))
        bits = store.bytes() * 8 / weight.numel()
        print(
            f"{kind:<10}{bits:6.2f}{error:8.4f}{forward:12.2f}{backward:13.2f}{wrong:14.4f}"
            f"{wrong_grad:16.4f}"
        )
    codes, scale = rounded_rows("fp8", weight)
    x_codes, x_scale = rounded_rows("fp8", x)
    parts = {
        "round x": lambda: rounded_rows("fp8", x),
        "round grad": lambda: rounded_rows("fp8", grad, scale.T),
        "transpose": lambda: transposed("fp8", codes),
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
    print("fp8 in parts: " + ", ".join(f"{n} {timed(p):.3f} ms" for n, p in parts.items()))


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
    if kind in ("nf4", "nf4_double", "fp4", "fp4_double"):
        largest = w.reshape(-1, store_bnb.BLOCK).abs().amax(dim=1)
        gap = store_bnb._table(kind.removesuffix("_double"), w.device).sort().values.diff().max()
        scale = max(store_bnb.SCALES) * largest
        return (scale.square().mean().sqrt() * gap / 2 / size).item()
    exponent, mantissa = FORMATS.get(kind, (4, 3))
    top = {"fp8": 448.0, "fp6": 28.0, "fp6_e2m3": 7.5, "fp5": 7.0}[kind]
    blocks = w if kind == "fp8" else w.reshape(-1, FLOAT_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / top
    smallest = 2.0 ** (1 - (2 ** (exponent - 1) - 1) - mantissa) * scale
    worst = torch.maximum(blocks.abs() * 2.0 ** -(mantissa + 1), smallest / 2)
    return (worst.square().mean().sqrt() / size).item()


def weights_of(model: RWKV | None, device: str) -> list[torch.Tensor]:
    """Linear weights to store: a model's that are not all zeros, or Gaussian ones."""
    if model is None:
        draw = torch.Generator(device).manual_seed(0)
        return [torch.randn(512, 1024, generator=draw, device=device) * 0.02]
    found = [m.weight.detach() for m in model.blocks.modules() if isinstance(m, Linear)]
    return [w for w in found if w.numel() % FLOAT_BLOCK == 0 and w.any()]


def errors(options: argparse.Namespace) -> None:
    """Errors of weights and outputs beside the bound, KL of a model's logits, gradient cosines."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stores = options.stores.split(",")
    found = {"random": weights_of(None, device)}
    if options.model:
        model = load_frozen(options.model, device=device, dtype=torch.float32)
        found[Path(options.model).name] = weights_of(model, device)
    print(f"{device}; root mean square, relative; bound: the most that the format allows")
    heads = [head for name in found for head in (f"{name}: weight", "bound", "output")]
    print(f"{'storage':<12}" + "".join(f"{head:>{max(len(head) + 2, 9)}}" for head in heads))
    for kind in stores:
        cells = [cell for weights in found.values() for cell in layer_errors(kind, weights)]
        shown = zip(cells, heads, strict=True)
        print(
            f"{kind:<12}" + "".join(f"{c:>{max(len(h) + 2, 9)}.4f}" for c, h in shown), flush=True
        )
    config = RWKVConfig(
        version=7,
        n_layer=options.layers,
        n_embd=options.channels,
        dim_ffn=4 * options.channels,
        vocab_size=options.vocabulary,
        ranks=default_ranks(7, options.channels),
    )
    keys = {"device": device, "backend": "auto"}
    ends = {"ends": options.ends}
    for residual in (None, *options.residual):
        whole_models(
            f"{config.name}, random" + f", residual {residual}" * (residual is not None),
            partial(random_model, config, residual=residual, **keys),
            tokens_of(options.vocabulary, "", options),
            device,
            stores,
            **ends,
        )
    whole_models(
        f"{config.name}, new",
        lambda flags, dtype: new_with_profile(config, flags, dtype=dtype, seed=0, **keys)[0],
        tokens_of(options.vocabulary, "", options),
        device,
        stores,
        **ends,
    )
    if options.model:
        whole_models(
            Path(options.model).name,
            lambda flags, dtype: load_with_profile(options.model, flags, dtype=dtype, **keys)[0],
            tokens_of(model.config.vocab_size, options.text, options),
            device,
            stores,
            **ends,
        )


def random_model(config: RWKVConfig, flags: PeftFlags, dtype: torch.dtype, **keys: Any) -> RWKV:
    return random_with_profile(config, flags, dtype=dtype, **keys)[0]


def tokens_of(
    vocabulary: int, text: str, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read before, [1, context], and after it with one more to predict, [1, tokens + 1].

    They are a file's first bytes, or random without one.
    """
    count = options.context + options.tokens + 1
    if text:
        tokens = torch.tensor([*Path(text).read_bytes()[:count]]).unsqueeze(0)
    else:
        draw = torch.Generator().manual_seed(1)
        tokens = torch.randint(vocabulary, (1, count), generator=draw)
    return tokens[:, : options.context], tokens[:, options.context :]


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


class RoundedRows(RowStore):
    """A store whose products round activations and gradients as those of 8 bits on a GPU do.

    In float32, on any device.
    """

    def forward_product(self, x: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        codes, scale = rounded_rows(self.kind, x.flatten(0, -2))
        out = F.linear((codes.float() * scale).view(x.shape), self.dense(torch.float32))
        return out if into is None else into.add_(out)

    def backward_product(
        self, grad: torch.Tensor, into: torch.Tensor | None = None, *, of_logits: bool = False
    ) -> torch.Tensor:
        if of_logits and self.kind == "int8":
            return super().backward_product(grad, into)
        codes, scale = rounded_rows(self.kind, grad.flatten(0, -2), self.scale.T)
        out = (codes.float() * scale @ self.codes.float()).unflatten(0, grad.shape[:-1])
        return out if into is None else into.add_(out)


def round_in_float32(model: RWKV) -> None:
    """Let int8 and fp8 round what they multiply, where their own products dequantize."""
    for layer in model.modules():
        store = getattr(layer, "store", None)
        if isinstance(layer, Linear) and isinstance(store, RowStore):
            parts, keys = store.tensors(), {"shape": store.shape, "dtype": store.dtype}
            layer.store_as(RoundedRows.restored(store.kind, parts, **keys))


def cosine_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """In float64: sums of millions of squares."""
    return F.cosine_similarity(got.double(), want.double(), dim=0).item()


def weight_error(model: RWKV, plain: RWKV) -> float:
    """Relative error of all stored weights together."""
    wrong = size = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, Matrix) and layer.store is not None:
            want = plain.get_submodule(name).dense_weight()
            wrong += (layer.dense_weight() - want).square().sum().item()
            size += want.square().sum().item()
    return (wrong / size) ** 0.5 if size else 0.0


def whole_models(
    name: str,
    make: Callable[[PeftFlags, torch.dtype], RWKV],
    tokens: tuple[torch.Tensor, torch.Tensor],
    device: str,
    stores: Sequence[str] = tuple(STORES),
    *,
    ends: bool = False,
) -> None:
    """A model over each storage: KL of its logits, cosine of the adapters' gradients.

    Both are taken behind a context. At a text's first token the wkv state holds one outer product,
    so that the head's norm reads (r k) v and gives little more than the sign of r k: where that is
    near 0, one head's gradient outweighs a tensor, in bfloat16 without any storage too.

    On a GPU all is bfloat16, on a CPU float32; the other of them is the first row, without storage.

    Args:
        name: of the model.
        make: it, from profile and dtype.
        tokens: as of tokens_of.
        device: to run on.
        stores: the storages.
        ends: the head and the embedding are stored too.
    """
    dtypes = [torch.bfloat16, torch.float32]
    dtype, other = dtypes if device == "cuda" else dtypes[::-1]
    context, scored = (part.to(device) for part in tokens)

    def run(
        kind: str, cast: torch.dtype = dtype
    ) -> tuple[RWKV, torch.Tensor, dict[str, torch.Tensor]]:
        """The model, log-probabilities [T, V], and the gradient of each adapter."""
        setting = Setting("0.4B", quant=kind, limited=True, rank=16, ends=ends)
        torch.manual_seed(2)
        model = make(peft_flags(setting), dtype)
        if dtype == torch.float32:  # where int8 and fp8 dequantize instead of rounding
            round_in_float32(model)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in trained.values():  # both factors away from 0
                torch.nn.init.normal_(parameter, std=0.02)
            if cast != dtype:
                model.to(cast)
            state = model(context)[1] if context.shape[1] else None
        hidden = model(scored[:, :-1], state)[0]
        found = model.logits(hidden)[0].float().log_softmax(-1)
        F.nll_loss(found, scored[0, 1:]).backward()
        grads = {n: p.grad.float().flatten() for n, p in trained.items() if p.grad is not None}
        return model, found.detach(), grads

    plain, exact, want = run("none")
    print(
        f"whole models{', head and embedding too' * ends}, {name}, LoRA of rank 16, "
        f"{scored.shape[1] - 1} tokens behind {context.shape[1]}, {dtype}:\n"
        f"{'storage':<15}  KL nats  top-1  cosine of gradients  least of a tensor  "
        "weight error  (1 - cosine) / its square"
    )
    for kind in ("none", *stores):
        model, found, got = run(kind, other if kind == "none" else dtype)
        kl = F.kl_div(found, exact, log_target=True, reduction="batchmean").item()
        top = (found.argmax(-1) == exact.argmax(-1)).float().mean().item()
        whole = cosine_of(torch.cat([*got.values()]), torch.cat([*want.values()]))
        least = min(cosine_of(got[n], want[n]) for n in want if want[n].any())
        error = weight_error(model, plain)
        del model
        print(
            f"{f'none, {other}'.replace('torch.', '') if kind == 'none' else kind:<15}{kl:9.5f}"
            f"{top:7.3f}{whole:21.4f}{least:19.4f}{error:14.4f}"
            + (f"{(1 - whole) / error**2:27.1f}" if error else ""),
            flush=True,
        )


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
        "all is stored": {"limited": True, "ends": True},
        "and small layers": {"limited": False},
    }
    for kind in options.stores.split(","):
        numbers = PUBLISHED[kind]
        for shape, number in zip(("1.5B", "2.9B"), numbers, strict=True):
            for name, keys in variants.items():
                if kind == "none" and keys.get("ends"):
                    continue
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


class Peak:
    """What a block of code takes at most, over what was there before: seconds, GPU, host.

    The host's part is anonymous memory, without the pages of files that are read; it is looked at
    every 5 ms, on Linux with glibc.
    """

    seconds = gpu = host = 0.0

    def __enter__(self) -> "Peak":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what was freed before hides what is taken
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._gpu = torch.cuda.memory_allocated()
        self._done, self._most, self._host = threading.Event(), 0, anonymous_memory()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        self._start = time.perf_counter()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self._most = max(self._most, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.gpu = torch.cuda.max_memory_allocated() - self._gpu
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._watch.join()
        self.host = max(self._most, anonymous_memory()) - self._host


def anonymous_memory() -> int:
    """Bytes that this process holds, but for pages of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def load(options: argparse.Namespace) -> None:
    """Seconds, memory and logits of a quantized file, of its making and of quantizing at load."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.cuda.get_device_name() if device == "cuda" else "cpu")
    start = time.perf_counter()
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            loads(
                config_of_shape(shape),
                options.stores.split(","),
                device,
                folder,
                until=start + options.seconds,
            )


def loads(
    config: RWKVConfig, stores: Sequence[str], device: str, folder: str, until: float = math.inf
) -> None:
    """The table of one model, of random numbers in bfloat16, under LoRA of rank 16.

    The files are in the page cache, for the system has just written them. On a CPU codes stay where
    the file is mapped, so that loading reads nothing of them.

    Args:
        config: its sizes.
        stores: the storages.
        device: to quantize and to load on.
        folder: for its file and one quantized file.
        until: begin no storage after this time of time.perf_counter.
    """
    base, small = Path(folder) / "base.pth", Path(folder) / "small.pth"
    model = random_with_profile(config, PeftFlags(), device=device, dtype=torch.bfloat16)[0]
    write_tensors(base, model.state_dict())
    del model
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (1, 64), generator=draw).to(device)

    def logits(path: Path, kind: str) -> tuple[Peak, torch.Tensor]:
        """What it takes to load, and the logits [64, V]."""
        torch.manual_seed(2)  # of lora_A
        flags = peft_flags(Setting("", quant=kind, rank=16, limited=True))
        with Peak() as peak:
            model = load_with_profile(path, flags, device=device, dtype=torch.bfloat16)[0]
        with torch.no_grad():
            return peak, model.logits(model(tokens)[0])[0]

    print(
        f"{config.name}: bfloat16, {base.stat().st_size / GIB:.2f} GiB; {device}; GiB of memory "
        "over what was there, GPU's + host's\n"
        "storage     file GiB  quantized at load      s  quantized to a file      s"
        "  file loaded        s  same logits"
    )
    peak, _ = logits(base, "none")
    print(f"{'none':<12}{'':8}{'':19}{'':7}{'':21}{'':7}{shown(peak)}", flush=True)
    for kind in stores:
        if time.perf_counter() > until:
            print("the time is over")
            return
        at_load, want = logits(base, kind)
        command = [
            "--load_model",
            base,
            "--quant_mode",
            kind,
            "--output",
            small,
            "--device",
            device,
        ]
        with Peak() as making, contextlib.redirect_stdout(io.StringIO()):
            quantize.main([str(word) for word in command])
        loading, got = logits(small, "none")
        print(
            f"{kind:<12}{small.stat().st_size / GIB:8.2f}{shown(at_load):>26}{shown(making):>28}"
            f"{shown(loading):>22}  {'yes' if torch.equal(got, want) else 'NO'}",
            flush=True,
        )


def shown(peak: Peak) -> str:
    return f"{peak.gpu / GIB:.2f} + {peak.host / GIB:.2f}{peak.seconds:9.2f}"


def command_line(options: argparse.Namespace) -> str:
    """The command with all of its options, those that were left out too."""
    words = [options.command]
    for name, value in vars(options).items():
        if name in ("command", "run") or value in (None, "", []):
            continue
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return f"python -m tests.bench_stores {shlex.join(words)}"


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
    some.add_argument("--context", type=int, default=128, help="tokens that are read before these")
    some.add_argument("--text", default="", help="a file whose bytes --model reads; else random")
    some.add_argument(
        "--residual",
        type=float,
        nargs="+",
        default=[],
        help="more random models, whose blocks add so much; the first takes 1/sqrt(2 layers)",
    )
    some.add_argument("--ends", action="store_true", help="store head and embedding too")
    some.add_argument("--stores", default=",".join(STORES), help="commas between")
    some.set_defaults(run=errors)
    some = commands.add_parser("speed", help=speed.__doc__)
    some.add_argument("--shapes", default="1.5B,2.9B,7.2B")
    some.add_argument(
        "--stores", default=",".join(("none", *STORES)), help="commas between; none is bfloat16"
    )
    some.add_argument("--rows", type=int, default=2)
    some.add_argument("--ctx_len", type=int, default=4096)
    some.add_argument("--steps", type=int, default=4)
    some.set_defaults(run=speed)
    some = commands.add_parser("published", help=published.__doc__)
    some.add_argument("--stores", default=",".join(PUBLISHED), help="commas between")
    some.set_defaults(run=published)
    some = commands.add_parser("load", help=load.__doc__)
    some.add_argument("--shapes", default="1.5B")
    some.add_argument("--stores", default=",".join(STORES), help="commas between")
    some.add_argument("--folder", default=None, help="where the files lie meanwhile; /tmp")
    some.set_defaults(run=load)
    for name in ("speed", "published", "load"):
        some = commands.choices[name]
        some.add_argument("--seconds", type=float, default=110.0, help="begin nothing after these")
    options = parser.parse_args()
    if torch.cuda.is_available():
        grow_segments()
    print(command_line(options))
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
