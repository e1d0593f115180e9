"""Time of the fused kernels, beside the formulas in plain torch, as a table.

    python -m tests.bench_fused
    python -m tests.bench_fused --shape 4,4096,2560 --frozen
    python -m tests.bench_fused --device cpu --shape 1,64,128
    python -m tests.bench_fused --head 32768,2048,65536

Columns: milliseconds forward and backward (median), in how many times the time of the formulas;
the tensors of the shape's size that must be read and written, and their time at the measured
copy speed as a share of the time taken (GPU only). Rows that contain matrix products of their own
are marked; their products' bytes are not counted. With --frozen no parameter has a gradient.

--head times a frozen head of n positions, C channels and V tokens instead, under the losses of
supervised fine-tuning, of preferences (log-probabilities, a factor for each) and of distillation
(the top 50 at temperature 2): milliseconds forward and backward and the peak of GPU memory over
what was there before, with the gradient made in the forward pass and with the head run again in the
backward pass, where distillation copies its logits into float32. The last column is by how much
the gradients of the hidden states differ, relative.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from losses.distill import Divergence
from losses.logprobs import (
    FewScores,
    TokenScores,
    map_logits,
    score_few,
    score_logits,
    score_tokens,
    sum_over_tokens,
    token_log_probs,
)
from losses.sft import l2wrap, smoothed_nll
from rwkv import cli
from rwkv.errors import InputError
from rwkv.linear import Linear
from rwkv.ops import fused
from rwkv.ops.activation import gated_sum, squared_relu
from rwkv.ops.head_output import head_output6, head_output7
from rwkv.ops.norm_mix import norm_shift_mix, norm_shift_mix_by_data
from rwkv.ops.wkv7_inputs import wkv7_inputs
from tests.bench_wkv import copy_speed, milliseconds

N = 64
RANK = 32  # of RWKV-6's mixes
FEW = 50  # tokens of a teacher
GIB = 2**30


class Row(NamedTuple):
    """One fusion: its call, what has gradients, and the tensors moved forward and backward."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    leaves: list[Tensor]
    forward: int
    backward: int


def rows(B: int, T: int, C: int, device: str, dtype: torch.dtype, frozen: bool) -> Iterator[Row]:
    """The fusions, one at a time, so that only one's tensors are held."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def parameter(*shape: int) -> nn.Parameter:
        value = torch.rand(shape, device=device, dtype=dtype)
        return nn.Parameter(value, requires_grad=not frozen)

    def large(count: int, width: int = C) -> list[Tensor]:
        return [tensor(B, T, width) for _ in range(count)]

    norm = nn.LayerNorm(C, device=device, dtype=dtype).requires_grad_(not frozen)
    heads = nn.GroupNorm(C // N, C, device=device, dtype=dtype).requires_grad_(not frozen)
    shift = torch.zeros(B, C, device=device, dtype=dtype)

    def row(
        name: str, run: Callable[[], Sequence[Tensor]], given: Sequence[Tensor], *moved: int
    ) -> Row:
        return Row(name, run, [x for x in given if x.requires_grad], *moved)

    for M, name in ((6, "v7"), (1, "v7 channels"), (2, "v6 channels")):
        (x,), mixes = large(1), [parameter(C) for _ in range(M)]

        def mix(x: Tensor = x, mixes: list[nn.Parameter] = mixes) -> Sequence[Tensor]:
            stream, mixed, _ = norm_shift_mix(x, norm, shift, mixes, None)
            return stream, *mixed

        yield row(f"norm_mix, {name}", mix, [x, *norm.parameters(), *mixes], 1 + M, 3 + M)

    (x,), mixes = large(1), [parameter(C) for _ in range(6)]
    low, high = parameter(C, 5 * RANK), parameter(5, RANK, C)
    low.data *= C**-0.5

    def by_data() -> Sequence[Tensor]:
        stream, mixed, _ = norm_shift_mix_by_data(
            x, norm, shift, mixes[0], low, high, mixes[1:], None
        )
        return stream, *mixed

    given = [x, *norm.parameters(), *mixes, low, high]
    yield row("norm_mix by data, v6 (products)", by_data, given, 8, 19)

    names = ("r", "k", "v", "v_first", "decay", "iclr", "value")
    inputs = dict(zip(names, large(7), strict=True))
    inputs |= {name: parameter(C) for name in ("w0", "a0", "v0", "k_k", "k_a")}
    inputs["r_k"] = parameter(C // N, N)
    yield row("wkv7_inputs", lambda: wkv7_inputs(**inputs), [*inputs.values()], 12, 22)

    y, v = (tensor(B, T, C // N, N) for _ in range(2))
    bonus, (gate,) = tensor(B, T, C // N), large(1)
    given = [y, bonus, v, gate, *heads.parameters()]
    yield row("head_output, v7", lambda: [head_output7(y, heads, bonus, v, gate)], given, 4, 7)
    given = [y, gate, *heads.parameters()]
    yield row("head_output, v6", lambda: [head_output6(y, heads, gate)], given, 3, 5)

    hidden = large(1, 4 * C)
    yield row("squared_relu, 4 C", lambda: [squared_relu(*hidden)], hidden, 8, 12)
    three = large(3)
    yield row("gated_sum, v6 channels", lambda: [gated_sum(*three)], three, 4, 5)


@contextlib.contextmanager
def formulas() -> Iterator[None]:
    """Run the plain formulas, whatever the device."""
    usual = fused.uses_kernels
    fused.uses_kernels = lambda *_: False  # type: ignore[assignment]
    try:
        yield
    finally:
        fused.uses_kernels = usual


def measure(row: Row, device: str, repeats: int) -> tuple[float, float]:
    """Milliseconds forward, without gradients, and backward."""
    with torch.no_grad():
        forward = milliseconds(row.run, device, repeats)
    outputs = [x for x in row.run() if x.requires_grad]
    flows = [torch.randn_like(x) for x in outputs]

    def backward() -> None:
        torch.autograd.grad(outputs, row.leaves, flows, retain_graph=True)

    return forward, milliseconds(backward, device, repeats)


class Head(nn.Module):
    """A frozen head of random weights, as losses take a model."""

    def __init__(self, C: int, V: int, device: str, dtype: torch.dtype):
        super().__init__()
        self.head = Linear(C, V).to(device, dtype).requires_grad_(False)
        nn.init.normal_(self.head.weight, std=2 * C**-0.5)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


class HeadRow(NamedTuple):
    """A loss of hidden states: along the way, and with the head run again."""

    name: str
    along: Callable[[Tensor], Tensor]
    again: Callable[[Tensor], Tensor]


def head_rows(n: int, C: int, V: int, device: str, dtype: torch.dtype) -> Iterator[HeadRow]:
    """The losses, over one head and one draw of targets."""
    model: Any = Head(C, V, device, dtype)
    targets = torch.randint(V, (n,), device=device)
    divergence = Divergence("forward", 2.0)

    def hard(scores: TokenScores) -> Tensor:
        return (smoothed_nll(scores, 0.1).sum() + l2wrap(scores, 1e-4)).reshape(1)

    def sft(logits: Tensor, targets: Tensor) -> Tensor:
        return hard(score_logits(logits, targets, given_up=True))

    yield HeadRow(
        "SFT",
        lambda hidden: sum_over_tokens(model, hidden, (targets,), sft)[0],
        lambda hidden: hard(score_tokens(model, hidden, targets))[0],
    )

    factors = torch.linspace(-1, 1, n, device=device)
    yield HeadRow(
        "log-probabilities",
        lambda hidden: (token_log_probs(model, hidden, targets) * factors).sum(),
        lambda hidden: (score_tokens(model, hidden, targets).log_prob * factors).sum(),
    )

    ids = torch.randint(V, (n, min(FEW, V)), device=device)
    values = torch.randn(ids.shape, device=device).log_softmax(dim=-1) - 0.1
    given = (targets, ids, values, torch.logsumexp(values / 2, dim=-1) + 0.5)

    def both(scores: TokenScores, few: FewScores, values: Tensor, lse: Tensor) -> Tensor:
        return 0.5 * hard(scores) + 0.5 * divergence.of_top_k(few, values, lse).sum()

    def top_k(logits: Tensor, targets: Tensor, ids: Tensor, values: Tensor, lse: Tensor) -> Tensor:
        return both(*score_few(logits, targets, ids, 2.0, given_up=True), values, lse)

    def copied(logits: Tensor, targets: Tensor, ids: Tensor, values: Tensor, lse: Tensor) -> Tensor:
        wide = logits.float()
        few = FewScores(wide.gather(-1, ids), torch.logsumexp(wide / 2, dim=-1), 2.0)
        return both(score_logits(wide, targets), few, values, lse)

    yield HeadRow(
        f"top-{ids.shape[1]} KL",
        lambda hidden: sum_over_tokens(model, hidden, given, top_k)[0],
        lambda hidden: torch.cat(map_logits(model, hidden, given, copied, copies=True)).sum(),
    )


def measure_head(
    loss: Callable[[Tensor], Tensor], hidden: Tensor, device: str, repeats: int
) -> tuple[float, float, Tensor]:
    """Milliseconds forward and backward, the peak in GiB (0 on a CPU), and hidden's gradient."""

    def run() -> Tensor:
        return torch.autograd.grad(loss(hidden), hidden)[0]

    taken, peak = milliseconds(run, device, repeats), 0
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    return taken, peak / GIB, run()


def print_heads(n: int, C: int, V: int, device: str, dtype: torch.dtype, repeats: int) -> None:
    """The table of --head."""
    print(
        "| loss | along the way ms | head again ms | again / along | along GiB | again GiB | "
        "difference |"
    )
    print("|---|---|---|---|---|---|---|")
    hidden = torch.randn(n, C, device=device, dtype=dtype, requires_grad=True)
    for row in head_rows(n, C, V, device, dtype):
        along, along_peak, got = measure_head(row.along, hidden, device, repeats)
        again, again_peak, want = measure_head(row.again, hidden, device, repeats)
        difference = ((got - want).float().norm() / want.float().norm()).item()
        print(
            f"| {row.name} | {along:.2f} | {again:.2f} | {again / along:.2f} | {along_peak:.2f} | "
            f"{again_peak:.2f} | {difference:.1e} |",
            flush=True,
        )


def sizes_of(flag: str, text: str, names: str) -> tuple[int, int, int]:
    """Three sizes from a flag's words."""
    try:
        first, second, third = (int(size) for size in text.split(","))
    except ValueError:
        raise InputError(f"{flag} {text}: is not {names}, three whole numbers") from None
    return first, second, third


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench_fused",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", default="8,4096,2048", metavar="B,T,C")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--frozen", action="store_true", help="no parameter has a gradient")
    parser.add_argument("--head", metavar="n,C,V", help="times a head under its losses instead")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(argv)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that PyTorch can use")
    dtype = getattr(torch, options.dtype)
    if options.head:
        n, C, V = sizes_of("--head", options.head, "n,C,V")
        where = torch.cuda.get_device_name() if gpu else "CPU"
        print(f"n,C,V = {options.head}, {options.dtype}, {where}, torch {torch.__version__}\n")
        print_heads(n, C, V, options.device, dtype, options.repeats)
        return 0
    B, T, C = sizes_of("--shape", options.shape, "B,T,C")
    if C % N:
        raise InputError(f"--shape {options.shape}: C is no multiple of {N}")

    speed = copy_speed("cuda") if gpu else None
    where = "CPU"
    if speed is not None:
        where = f"{torch.cuda.get_device_name()}, copies at {speed / 1e9:.2f} TB/s"
    print(
        f"B,T,C = {options.shape}, {options.dtype}, parameters "
        f"{'frozen' if options.frozen else 'trained'}, {where}, torch {torch.__version__}\n"
    )
    print(
        "| fusion | forward ms | formulas / it | backward ms | formulas / it | tensors moved | "
        "share of copy speed |"
    )
    print("|---|---|---|---|---|---|---|")
    size = B * T * C * dtype.itemsize
    for row in rows(B, T, C, options.device, dtype, options.frozen):
        forward, backward = measure(row, options.device, options.repeats)
        with formulas():
            plain_forward, plain_backward = measure(row, options.device, options.repeats)
        share = ""
        if speed is not None:
            least = (row.forward * size / speed, row.backward * size / speed)
            share = f"{least[0] / forward:.0%}, {least[1] / backward:.0%}"
        print(
            f"| {row.name} | {forward:.3f} | {plain_forward / forward:.1f} | {backward:.3f} | "
            f"{plain_backward / backward:.1f} | {row.forward}, {row.backward} | {share} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
