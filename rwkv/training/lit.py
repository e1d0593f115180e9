"""Hand a model and an objective to Lightning. No math lives here."""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv.errors import InputError
from rwkv.training.flags import OptimizerFlags
from rwkv.training.optimizer import make_optimizer
from rwkv.training.strategy import scatter


class Objective(Protocol):
    """What a run minimizes; losses/ has them."""

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch and its metrics; they add up over a step."""
        ...

    def measure(self, model: nn.Module, batch: Any) -> Tensor:
        """Quantities of a held-out batch, [K]; they add up over batches and ranks."""
        ...

    def summarize(self, total: list[float]) -> dict[str, float]:
        """From added-up measures to numbers for the log, their names without `val_`."""
        ...


class RateGroup(Protocol):
    """Parameters that share learning rates and weight decay."""

    @property
    def params(self) -> Sequence[nn.Parameter]: ...
    @property
    def lr_init(self) -> float: ...
    @property
    def lr_final(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def quiet_lightning() -> None:
    """Keep Lightning's hints about hardware and other products off the terminal; warnings stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Lightning 2.6.6 asks torch 2.13 for a class that a later Lightning no longer asks for
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")


class LitModel(pl.LightningModule):
    """Trains `model` on `objective(model, batch) -> (loss, metrics)`.

    A batch's loss is already divided by the count of the whole optimizer step, so what Lightning
    and DeepSpeed divide by (micro-batches, ranks) is multiplied back here.

    Args:
        model: in the dtype it trains in.
        objective: the loss.
        groups: what trains, and at what rates.
        flags: of the optimizer.
        strategy: --strategy.
        loader: rank -> its micro-batches, from the first that is still to be done.
        first_step: steps done before this process started (--resume).

    Raises:
        InputError: a tuned state or prefix under ZeRO-3.

    Attributes:
        step_sums: loss and metrics of the step so far on this rank; a callback reads and clears.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        groups: Sequence[RateGroup],
        flags: OptimizerFlags,
        *,
        strategy: str,
        loader: Callable[[int], Iterable[Any]],
        first_step: int = 0,
    ):
        super().__init__()
        names = [name for name, _ in model.named_parameters()]
        tuned = [n for n in names if n == "prefix" or n.endswith(".time_state")]
        if tuned and strategy.startswith("deepspeed_stage_3"):  # read outside of their modules
            raise InputError(
                f"--{'prefix_tuning' if 'prefix' in tuned else 'state'} 1: --strategy {strategy} "
                f"cannot scatter {tuned[0]}; use deepspeed_stage_2"
            )
        self.model, self.objective = model, objective
        self.groups, self.flags, self.strategy = groups, flags, strategy
        self.loader, self.first_step = loader, first_step
        self.step_sums: dict[str, Tensor] = {}

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the whole run, those before --resume included."""
        return self.first_step + self.trainer.global_step

    def configure_model(self) -> None:
        """Under ZeRO-3, scatter the weights: from here on a rank holds its part of each."""
        if self.strategy.startswith("deepspeed_stage_3"):
            scatter(self.model, self.trainer.strategy)

    def train_dataloader(self) -> Iterable[Any]:
        return self.loader(self.trainer.global_rank)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss, metrics = self.objective(self.model, batch)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            held = self.step_sums.get(name)
            self.step_sums[name] = value if held is None else held + value
        return loss * self._divided_by()

    def _divided_by(self) -> int:
        """What the trainer divides a gradient by between here and the optimizer."""
        accumulate = self.trainer.accumulate_grad_batches
        if self.strategy.startswith("deepspeed"):  # both Lightning and DeepSpeed divide
            accumulate *= accumulate
        return accumulate * self.trainer.world_size

    def configure_optimizers(self) -> Optimizer:
        groups = [
            {
                "params": list(group.params),
                "lr": group.lr_init,
                "weight_decay": group.weight_decay,
                "lr_init": group.lr_init,
                "lr_final": group.lr_final,
            }
            for group in self.groups
        ]
        on_gpu = torch.device(self.trainer.strategy.root_device).type == "cuda"
        return make_optimizer(groups, self.flags, strategy=self.strategy, on_gpu=on_gpu)
