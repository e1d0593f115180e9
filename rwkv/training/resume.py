"""Resume points: all that a run needs to go on as if it had never stopped."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from rwkv.checkpoint import UNREADABLE
from rwkv.errors import InputError
from rwkv.files import remove, replacing
from rwkv.training.distributed import gather_over_ranks
from rwkv.training.lit import LitModel
from rwkv.training.optimizer_state import read_state, write_state
from rwkv.training.run_folder import POINTS

FILE = "state.pt"  # within a resume point


def read_run(point: Path) -> dict[str, Any]:
    """The settings of a resume point's run; the tensors beside them are not read."""
    return _load(point, mmap=True)["run"]


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


def prepare_folder(folder: Path) -> None:
    """Mark the folder as a run's, and remove what a killed process had not finished writing."""
    (folder / POINTS).mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob(".*.part"), *(folder / POINTS).glob(".*.part")]:
        remove(left)


def save(trainer: pl.Trainer, lit: LitModel, folder: Path, run: dict[str, Any]) -> None:
    """Write a resume point for the steps done so far, then remove the older ones."""
    generators = gather_over_ranks(_generators())
    trained = read_state(trainer, _trained(lit))
    if trainer.is_global_zero:
        point = folder / POINTS / f"step-{lit.steps_done}"
        with replacing(point) as part:
            part.mkdir(parents=True)
            torch.save({"run": run, "generators": generators, "trained": trained}, part / FILE)
        for old in (folder / POINTS).glob("step-*"):
            if old != point:
                remove(old)
    trainer.strategy.barrier()


class Resume(pl.Callback):
    """Loads a resume point when the trainer has set everything up."""

    def __init__(self, point: Path):
        self.point = point

    def on_train_start(self, trainer: pl.Trainer, lit: LitModel) -> None:  # type: ignore[override]
        state = _load(self.point, mmap=False)
        write_state(trainer, _trained(lit), state["trained"])
        generators = state["generators"]
        if trainer.global_rank < len(generators):
            _restore(generators[trainer.global_rank])


def _trained(lit: LitModel) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in lit.model.named_parameters() if p.requires_grad}


def _load(point: Path, *, mmap: bool) -> dict[str, Any]:
    try:
        return torch.load(point / FILE, map_location="cpu", weights_only=True, mmap=mmap)
    except UNREADABLE as error:
        why = str(error).split(". ")[0].split("\n")[0]
        raise InputError(
            f"{point}: cannot be read (cut off or damaged: {why}); remove it, and the run goes on "
            "from an older one, or begins anew"
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
