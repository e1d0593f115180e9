"""Learning rates, sums over ranks, the log of a run and its progress display."""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from rwkv.errors import RunError
from rwkv.files import replacing
from rwkv.training.distributed import gather_over_ranks, sum_over_ranks
from rwkv.training.lit import LitModel
from rwkv.training.optimizer import gradient_norm
from rwkv.training.schedule import Schedule


class RunLog:
    """`train_log.jsonl`: one JSON object a line; training steps and evaluations, in order."""

    def __init__(self, folder: Path):
        self.path = folder / "train_log.jsonl"
        self._writes = False

    def open(self, first_step: int, writes: bool) -> None:
        """Begin after `first_step`: later lines, of a process that was killed, are dropped.

        Args:
            first_step: steps done before.
            writes: whether `add` does anything; true on rank 0 alone.
        """
        self._writes = writes
        if writes:
            old = read_log(self.path) if first_step else []
            kept = [line for line in old if line["step"] <= first_step]
            with replacing(self.path) as part:
                text = "".join(json.dumps(line) + "\n" for line in kept)
                part.write_text(text, encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Append one object."""
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a train_log.jsonl; a last line cut off by a kill is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines


class Moment(NamedTuple):
    """A point in time: by the host's clock, and in the device's queue where there is one."""

    host: float
    device: torch.cuda.Event | None

    @classmethod
    def now(cls, device: torch.device | None) -> "Moment":
        if device is None or device.type != "cuda":
            return cls(time.perf_counter(), None)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return cls(time.perf_counter(), event)

    def seconds_until(self, later: "Moment") -> float:
        """By the device's clock where both have one; `later` is over."""
        if self.device is None or later.device is None:
            return later.host - self.host
        return self.device.elapsed_time(later.device) / 1e3


class Unread(NamedTuple):
    """The numbers of a step on their way from the device.

    step: counted from 1.
    rates: learning rates of the parameter groups.
    names: of the numbers.
    numbers: float64 in host memory, [len(names)].
    arrived: when they are there.
    """

    step: int
    rates: list[float]
    names: list[str]
    numbers: Tensor
    arrived: Moment


class StepLog(pl.Callback):
    """Sets the learning rates, adds up a step's numbers and reports them.

    A GPU works through a queue, and reading a number waits until the queue is empty; the GPU then
    waits for the host in turn. So a step's numbers are read `behind` steps later, or as soon as
    `catch_up` is called.

    Args:
        run_log: where lines go.
        schedule: of the learning rates.
        every: steps between lines.
        step_tokens: tokens of a step whose rows are all full; the display shows how full they are.
        loggers: Lightning loggers that get the numbers too.
        behind: steps that the report stays behind the work.

    Attributes:
        stop_requested: the signal that this process was asked to stop by, 0 for none; read once a
            step, and one of any rank stops all of them after it.
        stopped_by: the signal that stops them, the same on all; 0 for none.
    """

    def __init__(
        self,
        run_log: RunLog,
        schedule: Schedule,
        *,
        every: int,
        step_tokens: int,
        loggers: list[Any],
        behind: int = 0,
    ):
        self.run_log, self.schedule, self.every = run_log, schedule, every
        self.step_tokens, self.loggers = step_tokens, loggers
        self.behind, self.stop_requested, self.stopped_by = behind, 0, 0
        self._tokens = 0
        self._ends_step = False
        self._device: torch.device | None = None
        self._since = Moment.now(None)
        self._bar: Any = None
        self._unread: list[Unread] = []

    def setup(self, trainer: pl.Trainer, lit: LitModel, stage: str) -> None:  # type: ignore[override]
        self.run_log.open(lit.first_step, trainer.is_global_zero)

    def on_train_start(self, trainer: pl.Trainer, lit: LitModel) -> None:  # type: ignore[override]
        self._device = torch.device(trainer.strategy.root_device)
        self.restart_clock()
        if trainer.is_global_zero:
            from tqdm import tqdm

            quiet = not sys.stderr.isatty()
            self._bar = tqdm(
                total=self.schedule.steps,
                initial=lit.first_step,
                unit="step",
                dynamic_ncols=True,
                mininterval=15.0 if quiet else 0.3,
                desc="train",
            )

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: pl.Trainer, lit: LitModel, batch: Any, index: int
    ) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.schedule.rate(lit.steps_done, group["lr_init"], group["lr_final"])
        self._tokens += batch.tokens()
        self._ends_step = (index + 1) % trainer.accumulate_grad_batches == 0

    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: pl.Trainer, lit: LitModel, optimizer: Any
    ) -> None:
        """Measure the gradients before they are clipped; DeepSpeed does it by itself."""
        if not lit.strategy.startswith("deepspeed"):
            params = (p for group in optimizer.param_groups for p in group["params"])
            lit.gradient_norm = gradient_norm(params)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, lit: LitModel, outputs: Any, batch: Any, index: int
    ) -> None:
        """Add the step's numbers up over ranks, and report what was to be reported by now."""
        if not self._ends_step:
            return
        if self.stop_requested and trainer.world_size == 1:  # else all ranks stop together
            trainer.should_stop = True
        self._unread.append(self._send(trainer, lit))
        while len(self._unread) > self.behind:
            self._report(trainer)

    def _send(self, trainer: pl.Trainer, lit: LitModel) -> Unread:
        """Begin to bring the step's numbers to the host."""
        names = sorted(lit.step_sums)
        values = [lit.step_sums[name].double() for name in names]
        for name, number in (("tokens", self._tokens), ("stop", bool(self.stop_requested))):
            names.append(name)
            values.append(torch.full_like(values[0], number))
        lit.step_sums, self._tokens = {}, 0
        total = sum_over_ranks(torch.stack(values))
        norm: Any = lit.gradient_norm
        if lit.strategy.startswith("deepspeed"):
            norm = trainer.model.get_global_grad_norm()  # type: ignore[union-attr,operator]
        if norm is not None:
            names.append("grad_norm")
            last = norm.to(total) if isinstance(norm, Tensor) else torch.full_like(total[0], norm)
            total = torch.cat([total, last.view(1)])
        lit.gradient_norm = None
        numbers = total.to("cpu", non_blocking=True)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        return Unread(lit.steps_done, rates, names, numbers, Moment.now(self._device))

    def catch_up(self, trainer: pl.Trainer) -> None:
        """Report all steps that are done.

        Raises:
            RunError: the loss of one of them, or the norm of its gradients, is not finite.
        """
        while self._unread:
            self._report(trainer)

    def _report(self, trainer: pl.Trainer) -> None:
        """Log the oldest step that was not, and stop at a loss or gradients that are not finite."""
        step, rates, names, numbers, arrived = self._unread.pop(0)
        if arrived.device is not None:
            arrived.device.synchronize()
        summed = dict(zip(names, numbers.tolist(), strict=True))
        for name, words in (("loss", "loss"), ("grad_norm", "norm of the gradients")):
            if not math.isfinite(summed.get(name, 0.0)):
                raise RunError(
                    f"step {step}: the {words} is {summed[name]}; lower --lr_init, "
                    f"or look at the data; models saved so far are in {self.run_log.path.parent}"
                )
        seconds, self._since = self._since.seconds_until(arrived), arrived
        if summed.pop("stop"):
            self.stopped_by = max(gather_over_ranks(self.stop_requested))
            trainer.should_stop = True
        tokens = int(summed.pop("tokens"))
        line = {"step": step, **summed, "lr": max(rates)}
        if len(set(rates)) > 1:
            line["lr_groups"] = rates
        line |= {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "fill": tokens / self.step_tokens,
            "seconds": seconds,
        }
        if torch.cuda.is_available():
            line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if step % self.every == 0 or step == self.schedule.steps:
            self.run_log.add(line)
            for logger in self.loggers:
                shown = {k: v for k, v in line.items() if isinstance(v, int | float)}
                logger.log_metrics(shown, step=step)
        self._show(line)

    def on_train_end(self, trainer: pl.Trainer, lit: LitModel) -> None:  # type: ignore[override]
        self.catch_up(trainer)

    def _show(self, line: dict[str, Any]) -> None:
        if self._bar is None:
            return
        shown = {"loss": f"{line['loss']:.4f}", "tok/s": f"{line['tokens_per_second']:,.0f}"}
        if "peak_memory_gb" in line:
            shown["GiB"] = f"{line['peak_memory_gb']:.1f}"
        shown["fill"] = f"{line['fill']:.0%}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(line["step"] - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(text + "\n")

    def restart_clock(self) -> None:
        """Leave what happened since the last step (an evaluation, a save) out of the rate."""
        self._since = Moment.now(self._device)

    def on_exception(self, trainer: pl.Trainer, lit: Any, exception: BaseException) -> None:  # type: ignore[override]
        self.teardown(trainer, lit, "fit")

    def teardown(self, trainer: pl.Trainer, lit: Any, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def draw_loss(log: Path, picture: Path) -> bool:
    """Draw the loss curve of a train_log.jsonl as a PNG: each step, a running mean, evaluations.

    Returns:
        whether there was something to draw, and matplotlib to draw it with.
    """
    lines = read_log(log)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    if not train or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = zip(*train, strict=True)
    window = max(1, len(losses) // 30)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training loss, each step")
    means = [
        sum(losses[max(0, i - window) : i + 1]) / (min(i, window) + 1) for i in range(len(losses))
    ]
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window + 1} steps")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:red", label="held-out loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(picture) as part:
        FigureCanvasAgg(figure).print_png(str(part))
    return True
