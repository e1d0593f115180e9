"""Held-out loss and samples while training."""

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from rwkv.training.distributed import sum_over_ranks
from rwkv.training.lit import LitModel, Objective
from rwkv.training.step_log import StepLog


class Evaluation(pl.Callback):
    """Evaluates before the first step, every N steps and at saved models.

    Args:
        batches: rank -> its held-out batches, made anew for each evaluation.
        objective: what measures a batch and summarizes the added-up measures.
        sample: the model -> texts to show; None for none.
        steps: at which steps to evaluate.
        step_log: of the run.
    """

    def __init__(
        self,
        *,
        batches: Callable[[int], Iterable[Any]],
        objective: Objective,
        sample: Callable[[Any], list[str]] | None,
        steps: Callable[[int], bool],
        step_log: StepLog,
    ):
        self.batches, self.objective = batches, objective
        self.sample, self.steps, self.step_log = sample, steps, step_log
        self._done = -1

    def on_train_start(self, trainer: pl.Trainer, lit: LitModel) -> None:  # type: ignore[override]
        self._done = lit.first_step  # a resumed run has measured it before
        if lit.first_step == 0:
            self.evaluate(trainer, lit)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, lit: LitModel, outputs: Any, batch: Any, index: int
    ) -> None:
        if lit.steps_done != self._done and self.steps(lit.steps_done):
            self.evaluate(trainer, lit)

    def evaluate(self, trainer: pl.Trainer, lit: LitModel) -> dict[str, float]:
        """Run the held-out batches and the samples; returns the numbers that were logged."""
        self._done = lit.steps_done
        self.step_log.catch_up(trainer)
        training = lit.training
        lit.eval()
        with torch.no_grad(), torch.random.fork_rng():
            total: Tensor | None = None
            for held in self.batches(trainer.global_rank):
                moved = trainer.strategy.batch_to_device(held, lit.device)
                part = self.objective.measure(lit.model, moved)
                total = part if total is None else total + part
            assert total is not None
            numbers = self.objective.summarize(sum_over_ranks(total).tolist())
            texts = self.sample(lit.model) if self.sample else []
        lit.train(training)
        line = {f"val_{name}": value for name, value in numbers.items()}
        self.step_log.run_log.add({"step": self._done, **line})
        for logger in self.step_log.loggers:
            logger.log_metrics(line, step=self._done)
        if trainer.is_global_zero:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in line.items())
            self.step_log.say(f"step {self._done}: {shown}")
            for text in texts:
                self.step_log.say(text)
        self.step_log.restart_clock()
        return line
