"""From flags to the one objective of a run."""

from collections.abc import Callable
from typing import Any

from losses.flags import ChunkFlags, DistillationFlags, SFTFlags
from losses.preference_flags import PREFERENCES
from rwkv.errors import InputError
from rwkv.flags import Settings

OBJECTIVES = ("sft", "distillation", *PREFERENCES)


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


def make_objective(settings: Settings, teacher: Any = None) -> Callable[..., Any]:
    """The objective `(model, batch) -> (loss, metrics)` that the flags ask for.

    Args:
        settings: of the run.
        teacher: the model of --teacher_model.
    """
    from losses.sft import SFT
    from rwkv.chunks import ChunkPlan

    chosen = chosen_objective(settings)
    sft, chunks = settings[SFTFlags], settings[ChunkFlags]
    plan = None
    if chunks.infctx:
        plan = ChunkPlan(
            length=chunks.chunk_ctx,
            truncated=chunks.chunk_grad == "truncated",
            offload=chunks.chunk_offload,
        )
    if chosen == "distillation":
        return make_distillation(settings[DistillationFlags], sft, plan, teacher)
    if chosen in PREFERENCES:
        from losses.preference_objectives import make_preference

        return make_preference(chosen, settings, plan)
    return SFT(smoothing=sft.smoothing, l2wrap=sft.l2wrap, chunks=plan)


def make_distillation(
    flags: DistillationFlags, sft: SFTFlags, plan: Any, teacher: Any
) -> Callable[..., Any]:
    """The objective of --distillation; `check_distillation` has seen its flags."""
    from losses.distill import Distillation, Divergence

    return Distillation(
        Divergence(flags.kd_loss, flags.temperature, flags.jsd_beta),
        alpha=flags.alpha,
        smoothing=sft.smoothing,
        l2wrap=sft.l2wrap,
        teacher=teacher,
        chunks=plan,
    )


def check_distillation(flags: DistillationFlags) -> None:
    """Stop at flags that contradict each other.

    Raises:
        InputError: the divergence needs a file of scores.
    """
    if flags.teacher_model and flags.kd_loss.endswith("renormalized"):
        raise InputError(
            f"--kd_loss {flags.kd_loss}: is for a file of top-k scores, --teacher_model knows the "
            "whole vocabulary; use forward, reverse or jsd"
        )
