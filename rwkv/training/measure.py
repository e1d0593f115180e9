"""What training steps really occupy on a GPU, by moment, and how long they take."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from rwkv.training.optimizer import MasterWeights, gradient_norm


class Measured(NamedTuple):
    """Bytes that torch handed out, over what it had before.

    loading: at most while the model was made.
    model: by the model once it was there.
    optimizer: by the optimizer after its first step.
    gradients: by the gradients of all micro-batches.
    walking: at most in a forward and backward pass, over model and optimizer.
    stepping: at most in the optimizer's step, over model and optimizer.
    peak: at most at any time.
    reserved: at most held by torch.
    seconds: of a step after the first, the median.
    """

    loading: int
    model: int
    optimizer: int
    gradients: int
    walking: int
    stepping: int
    peak: int
    reserved: int
    seconds: float


def measure(
    make: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], MasterWeights],
    objective: Callable[[nn.Module, Any], tuple[torch.Tensor, Any]],
    batches: Sequence[Any],
    *,
    steps: int = 2,
) -> Measured:
    """Make a model on the current GPU and train it for a few steps.

    Args:
        make: gives the model.
        make_optimizer: gives the optimizer over what trains.
        objective: the loss of a micro-batch and metrics.
        batches: micro-batches of a step, on the GPU; all steps take the same.
        steps: at least 2.

    Raises:
        torch.OutOfMemoryError: the GPU has too little.
    """
    gc.collect()  # what an earlier measurement left in cycles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    peaks = []

    def highest(since: int) -> int:
        """At most since the last call, over `since`."""
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        torch.cuda.reset_peak_memory_stats()
        return peaks[-1] + before - since

    torch.cuda.reset_peak_memory_stats()
    model = make()
    loading = highest(before)
    made = torch.cuda.memory_allocated()
    optimizer = make_optimizer(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    walking = stepping = gradients = 0
    times = []
    for _ in range(steps):
        rest = torch.cuda.memory_allocated()
        start = time.perf_counter()
        for batch in batches:
            loss, _ = objective(model, batch)
            loss.backward()
            del loss
        walking = highest(rest)
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        optimizer.clip(gradient_norm(trained), 1.0)
        optimizer.step()
        stepping = highest(rest)
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return Measured(
        loading=loading,
        model=made - before,
        optimizer=torch.cuda.memory_allocated() - made,
        gradients=gradients,
        walking=walking,
        stepping=stepping,
        peak=max(peaks),
        reserved=torch.cuda.max_memory_reserved(),
        seconds=statistics.median(times[1:]),
    )
