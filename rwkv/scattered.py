"""Parameters that DeepSpeed's ZeRO stage 3 scatters over ranks, as the code that runs them sees it.

A module's parameters are gathered while it runs and emptied behind it. Every rank takes part in
the gathering, so all have to run the same modules in the same order, however long their texts are.
"""

from typing import Any

import torch


def is_scattered(model: Any) -> bool:
    """Whether the parameters of a model are scattered."""
    return hasattr(next(model.parameters(), None), "ds_id")


def most_of_all_ranks(number: int, model: Any, device: torch.device) -> int:
    """The largest `number` of any rank where the model is scattered, else this rank's own.

    Args:
        number: how often this rank would run some modules of the model.
        model: whose modules they are.
        device: of the tensors that go through them.
    """
    if not is_scattered(model) or torch.distributed.get_world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)
