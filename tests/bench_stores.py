"""Time and memory of each storage's product on a GPU, as a table.

    python tests/bench_stores.py

One linear layer [out, in] in bfloat16, T tokens, forward and gradient of the input.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft.stores import STORES, make_store


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Time and memory of each storage on a GPU.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sides", type=int, nargs=2, default=(16384, 4096), help="out and in")
    options = parser.parse_args()
    out_features, in_features = options.sides
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) * 0.02
    x = torch.randn(options.tokens, in_features, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(options.tokens, out_features, device="cuda", dtype=torch.bfloat16)
    print(
        f"{torch.cuda.get_device_name()}: {list(weight.shape)}, {options.tokens} tokens, bfloat16"
    )
    print("storage     bits   error  forward ms  backward ms  output error")
    exact = x @ weight.T
    forward = milliseconds(lambda: x @ weight.T)
    backward = milliseconds(lambda: grad @ weight)
    print(f"{'none':<10}{16:6.2f}{0:8.4f}{forward:12.2f}{backward:13.2f}{0:14.4f}")
    for kind in STORES:
        store = make_store(kind, weight)
        error = (store.dense(torch.bfloat16) - weight).norm() / weight.norm()
        got = store.forward_product(x)
        wrong = (got - exact).norm() / exact.norm()
        forward = milliseconds(lambda store=store: store.forward_product(x))
        backward = milliseconds(lambda store=store: store.backward_product(grad))
        bits = store.bytes() * 8 / weight.numel()
        print(f"{kind:<10}{bits:6.2f}{error:8.4f}{forward:12.2f}{backward:13.2f}{wrong:14.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
