"""The backend that a run's wkv will have."""

from typing import TYPE_CHECKING

from data.flags import DataFlags
from rwkv.ops.backends import Choice, choice_for
from rwkv.training.flags import ModelFlags

if TYPE_CHECKING:
    from rwkv.run.overview import Run


def wkv_choice(run: "Run") -> Choice:
    """Choose it for a whole micro-batch.

    Raises:
        RunError: the kernel asked for cannot run here.
    """
    config, plan = run.config, run.batches.training
    return choice_for(
        f"wkv{config.version}",
        (1, plan.micro_bsz * run.settings[DataFlags].ctx_len, config.n_head, config.head_size),
        device=run.device.kind,
        dtype=run.device.dtype,
        packed=plan.packing,
        backend=run.settings[ModelFlags].backend,
    )
