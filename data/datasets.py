"""A plan's batches as a torch DataLoader."""

import signal
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data.batch_plan import BatchPlan


class MicroBatches(Dataset):
    """A rank's batches of a plan, from `first` to before `last`."""

    def __init__(self, plan: BatchPlan, rank: int, first: int, last: int):
        self.plan, self.rank, self.first, self.last = plan, rank, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.plan.micro_batch(self.first + index, self.rank)


def make_loader(plan: BatchPlan, rank: int, first: int, last: int, workers: int = 0) -> DataLoader:
    """A loader of a rank's micro-batches `first` to `last` - 1, the same for any `workers`.

    Args:
        plan: what each micro-batch is.
        rank: in 0..plan.world-1. Give the loader to Lightning with use_distributed_sampler=False.
        first, last: numbers of micro-batches, counted from the start of the run; a run that goes
            on after step s begins at s * plan.accumulate.
        workers: processes that prepare batches; 0 for none.
    """
    return DataLoader(
        MicroBatches(plan, rank, first, last),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # a loader draws a seed; the model's dropout must not notice
    )


def _ignore_signals(worker: int) -> None:
    """A terminal and `timeout` signal the whole group; a run that then finishes its step needs
    batches, and ends this process by itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
