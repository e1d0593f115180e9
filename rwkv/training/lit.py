"""Hand a model and an objective to Lightning. No math lives here."""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv.errors import InputError
from rwkv.ops.packing import remember_lengths, text_lengths
from rwkv.training.flags import OptimizerFlags
from rwkv.training.graphed import GraphedSteps
from rwkv.training.optimizer import MasterWeights, gradient_norm, make_optimizer
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
        graphs: what runs micro-batches as CUDA graphs; None where none are.

    Raises:
        InputError: a tuned state or prefix under ZeRO-3.

    Attributes:
        step_sums: loss and metrics of the step so far on this rank; a callback reads and clears.
        gradient_norm: of all gradients before they are clipped, a float32 scalar, where a callback
            has measured it; it is cleared there too.
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
        graphs: GraphedSteps | None = None,
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
        self.graphs = graphs
        self.step_sums: dict[str, Tensor] = {}
        self.gradient_norm: Tensor | None = None

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

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Lightning's move, without waiting for the device; how long packed texts are goes along,
        for reading it back would wait."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        for name, borders in batch._asdict().items():
            if name.endswith("seqlens") and borders is not None and not borders.is_cuda:
                remember_lengths(getattr(moved, name), text_lengths(borders))
        return moved

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.graphs is None:
            loss, metrics = self.objective(self.model, batch)
        else:
            loss, metrics = self.graphs(batch)
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

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to a norm, which is not measured again where a callback has; DeepSpeed clips by
        itself."""
        if gradient_clip_val is None or self.strategy.startswith("deepspeed"):
            return
        norm = self.gradient_norm
        if norm is None:
            norm = gradient_norm(p for group in optimizer.param_groups for p in group["params"])
        cast(MasterWeights, optimizer).clip(norm, gradient_clip_val)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step and let go of the gradients, which Lightning keeps until the next forward pass is
        over."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not self.strategy.startswith("deepspeed"):
            optimizer.zero_grad()

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
