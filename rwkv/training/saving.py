"""Save models and resume points on time, and when the run is told to stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from rwkv.checkpoint import write_tensors
from rwkv.state import state_tensors
from rwkv.training import resume
from rwkv.training.distributed import whole_parameters
from rwkv.training.lit import LitModel
from rwkv.training.step_log import StepLog


class Saving(pl.Callback):
    """Writes `rwkv-EPOCH.pth` at the end of epochs, resume points, and both when stopped.

    Args:
        folder: of the run.
        epochs: step -> number of the epoch that ends there and is saved.
        every: steps between resume points besides; 0 for none.
        tensors: what a saved model holds; called on every rank.
        metadata: what the file is; goes beside it.
        run: settings that a resumed run must share.
        step_log: catches up before anything is saved.
    """

    def __init__(
        self,
        folder: Path,
        *,
        epochs: dict[int, int],
        every: int,
        tensors: Callable[[], dict[str, Tensor]],
        metadata: dict[str, Any],
        run: dict[str, Any],
        step_log: StepLog,
    ):
        self.folder, self.epochs, self.every = folder, epochs, every
        self.tensors, self.metadata, self.run, self.step_log = tensors, metadata, run, step_log
        self.written: list[Path] = []
        self._saved_step = -1

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, lit: LitModel, outputs: Any, batch: Any, index: int
    ) -> None:
        done = lit.steps_done
        if done == self._saved_step or done == lit.first_step:
            return
        epoch = self.epochs.get(done)
        due = self.every and done % self.every == 0
        if epoch is None and not due and not trainer.should_stop:
            return
        self.step_log.catch_up(trainer)  # which stops at a loss or gradients that are not finite
        if epoch is not None:
            self.save_model(trainer, lit, f"rwkv-{epoch}.pth", epoch)
        resume.save(trainer, lit, self.folder, self.run)
        self._saved_step = done
        self.step_log.restart_clock()

    def save_model(self, trainer: pl.Trainer, lit: LitModel, name: str, epoch: int) -> None:
        """Write the trained tensors under `name`, once, from rank 0.

        The state that texts start from, where it is tuned, is in a file of its own besides, which
        other runners read too.
        """
        trained = [p for p in lit.model.parameters() if p.requires_grad]
        with whole_parameters(trainer, trained):
            tensors = self.tensors()
            if trainer.is_global_zero:
                path = self.folder / name
                metadata = self.metadata | {"step": lit.steps_done, "epoch": epoch}
                write_tensors(path, tensors, metadata)
                self.written.append(path)
                if any(n == "prefix" or n.endswith(".time_state") for n in tensors):
                    states = _first_state(lit.model)
                    beside = path.with_stem(f"{path.stem}-state")
                    write_tensors(beside, states, metadata | {"kind": "state"})
                    self.written.append(beside)
        trainer.strategy.barrier()


@torch.no_grad()
def _first_state(model: Any) -> dict[str, Tensor]:
    """The state that texts start from, after the prefix if there is one, as a file holds it."""
    training = model.training
    model.eval()
    tensors = state_tensors(model.initial_state(1))
    model.train(training)
    return tensors
