"""Resume points: all that a run needs to go on as if it had never stopped."""

import contextlib
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from rwkv.errors import InputError
from rwkv.files import remove, replacing
from rwkv.training.distributed import gather_over_ranks, whole_parameters
from rwkv.training.lit import LitModel

FOLDER = "resume"
ENGINE = "engine"  # DeepSpeed's own files, within a resume point


def newest(folder: Path) -> Path | None:
    """The last resume point of a run, None if it has none. Each is a folder `step-N`."""
    points = [p for p in (folder / FOLDER).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return max(points, key=lambda p: int(p.name[5:]), default=None)


def read_run(point: Path) -> dict[str, Any]:
    """What the run of a resume point was: its step count and settings."""
    return _load(point)["run"]


def check_same_run(point: Path, run: dict[str, Any]) -> int:
    """Return the steps done at `point`, if the run that wants to go on is the one that stopped.

    Raises:
        InputError: data, seed, rows of a step or length differ; the message names the first.
    """
    before = read_run(point)
    for key, value in run.items():
        if before.get(key) != value:
            raise InputError(
                f"--resume: {point} was made with {key} = {before.get(key)}, this run has "
                f"{value}; use the same flags, or another --proj_dir"
            )
    return int(point.name[5:])


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process had not finished writing."""
    for left in [*folder.glob(".*.part"), *(folder / FOLDER).glob(".*.part")]:
        remove(left)


def save(trainer: pl.Trainer, lit: LitModel, folder: Path, run: dict[str, Any]) -> None:
    """Write a resume point for the steps done so far, then remove the older ones."""
    name = f"step-{lit.steps_done}"
    engine: Any = trainer.model if lit.strategy.startswith("deepspeed") else None
    generators = gather_over_ranks(_generators())
    point = folder / FOLDER / name
    with contextlib.ExitStack() as stack:
        part = stack.enter_context(replacing(point)) if trainer.is_global_zero else None
        part = Path(trainer.strategy.broadcast(str(part)))
        if engine is not None:
            engine.save_checkpoint(str(part), tag=ENGINE, exclude_frozen_parameters=True)
        if trainer.is_global_zero:
            part.mkdir(parents=True, exist_ok=True)
            state: dict[str, Any] = {"run": run, "generators": generators}
            if engine is None:
                state["trained"] = {n: p.detach() for n, p in _trained(lit)}
                state["optimizer"] = trainer.optimizers[0].state_dict()
            torch.save(state, part / "state.pt")
        trainer.strategy.barrier()
    if trainer.is_global_zero:
        for old in (folder / FOLDER).glob("step-*"):
            if old != point:
                remove(old)
    trainer.strategy.barrier()


class Resume(pl.Callback):
    """Loads a resume point when the trainer has set everything up."""

    def __init__(self, point: Path):
        self.point = point

    def on_train_start(self, trainer: pl.Trainer, lit: LitModel) -> None:  # type: ignore[override]
        state = _load(self.point)
        if lit.strategy.startswith("deepspeed"):
            engine: Any = trainer.model
            path, _ = engine.load_checkpoint(str(self.point), tag=ENGINE, load_module_strict=False)
            if path is None:
                raise InputError(f"{self.point}: holds no DeepSpeed state; use the same --strategy")
        else:
            if "optimizer" not in state:
                raise InputError(f"{self.point}: was written by DeepSpeed; use the same --strategy")
            parameters = dict(_trained(lit))
            with torch.no_grad(), whole_parameters(trainer, parameters.values()):
                for name, value in state["trained"].items():
                    parameters[name].copy_(value)
            trainer.optimizers[0].load_state_dict(state["optimizer"])
        generators = state["generators"]
        if trainer.global_rank < len(generators):
            _restore(generators[trainer.global_rank])


def _trained(lit: LitModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in lit.model.named_parameters() if p.requires_grad]


def _load(point: Path) -> dict[str, Any]:
    try:
        return torch.load(point / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{point}: cannot be read ({str(error).splitlines()[0]}); remove it to use an older one"
        ) from None


def _generators() -> dict[str, Any]:
    version, keys, gauss = random.getstate()
    _, numbers, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(keys), gauss],
        "numpy": [torch.from_numpy(np.asarray(numbers, np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numbers, position, has_gauss, cached = state["numpy"]
    keys32 = numbers.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys32, position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
