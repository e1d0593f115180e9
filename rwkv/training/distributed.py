"""The few places where ranks and ZeRO-3's scattered parameters show."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

Value = TypeVar("Value")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add a tensor up over all ranks; on one rank it is returned as it is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def gather_over_ranks(value: Value) -> list[Value]:
    """Every rank's value, in the order of ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def is_zero3(trainer: pl.Trainer) -> bool:
    """Whether parameters are scattered over ranks (DeepSpeed's ZeRO stage 3)."""
    return bool(getattr(trainer.strategy, "zero_stage_3", False))


@contextlib.contextmanager
def whole_parameters(trainer: pl.Trainer, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block every rank sees whole parameters, under ZeRO-3 too."""
    if not is_zero3(trainer):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None):
        yield
