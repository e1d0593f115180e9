"""Whether a run's micro-batches become CUDA graphs."""

from typing import TYPE_CHECKING

from losses.flags import ChunkFlags
from losses.objectives import chosen_objective
from rwkv.errors import InputError, RunError
from rwkv.run.kernel import wkv_choice
from rwkv.run.models import is_for_gpu
from rwkv.training.flags import TrainerFlags

if TYPE_CHECKING:
    from rwkv.run.overview import Run


def uses_graphs(run: "Run") -> bool:
    """Whether --cuda_graphs, or what it leaves to us, wants graphs.

    Raises:
        InputError: --cuda_graphs 1 in a run that cannot have them.
    """
    flags = run.settings[TrainerFlags]
    wanted = flags.cuda_graphs
    if not wanted:
        return False
    reason = why_not(run)
    elsewhere = run.device.kind != "cuda" and is_for_gpu(run.settings, run.device)
    if reason and wanted != "auto" and not elsewhere:
        raise InputError(f"--cuda_graphs 1: {reason}; use --cuda_graphs auto")
    return not reason


def why_not(run: "Run") -> str:
    """Why micro-batches cannot be recorded; "" if they can."""
    settings, flags = run.settings, run.settings[TrainerFlags]
    if run.device.kind != "cuda":
        return f"records a GPU's work, and the model is on {run.device.kind}"
    if flags.strategy != "auto" or flags.devices * flags.num_nodes > 1:
        return "records what one GPU does under --strategy auto"
    if chosen_objective(settings) != "sft" or settings[ChunkFlags].infctx:
        return "records --sft 1 without --infctx 1"
    if any(layer.dropout for layer in run.layers.plans.values()):
        return "the layer profile asks for dropout, which draws anew at every step"
    try:
        name = wkv_choice(run).name
    except RunError as error:
        return str(error)
    return "" if name in ("cuda", "triton") else f"--kernel {name} waits for the GPU"
