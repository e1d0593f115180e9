"""From flags to the one objective of a run."""

from collections.abc import Callable
from typing import Any

from losses.flags import ChunkFlags, SFTFlags
from rwkv.errors import InputError
from rwkv.flags import Settings

OBJECTIVES = ("sft",)


def chosen_objective(settings: Settings) -> str:
    """The name of the one objective that is switched on.

    Raises:
        InputError: none or several are.
    """
    values = settings.as_flags()
    on = [name for name in OBJECTIVES if values[name]]
    if len(on) == 1:
        return on[0]
    choices = ", ".join(f"--{name} 1" for name in OBJECTIVES)
    if not on:
        raise InputError(f"train.py: no objective is chosen; add one of {choices}")
    given = " and ".join(f"--{name}" for name in on)
    raise InputError(f"train.py: {given} exclude each other; keep one of {choices}")


def make_objective(settings: Settings) -> Callable[..., Any]:
    """The objective `(model, batch) -> (loss, metrics)` that the flags ask for.

    Raises:
        InputError: a value is out of its range.
    """
    from losses.sft import SFT
    from rwkv.chunks import ChunkPlan

    chosen_objective(settings)
    sft, chunks = settings[SFTFlags], settings[ChunkFlags]
    if not 0 <= sft.smoothing < 1:
        raise InputError(f"--smoothing {sft.smoothing}: outside 0 to below 1; 0.001 is usual")
    if chunks.infctx and chunks.chunk_ctx < 1:
        raise InputError(f"--chunk_ctx {chunks.chunk_ctx}: a chunk needs at least 1 token")
    plan = None
    if chunks.infctx:
        plan = ChunkPlan(
            length=chunks.chunk_ctx,
            truncated=chunks.chunk_grad == "truncated",
            offload=chunks.chunk_offload,
        )
    return SFT(smoothing=sft.smoothing, l2wrap=sft.l2wrap, chunks=plan)
