"""Learning rates, sums over ranks, the log of a run and its progress display."""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rwkv.errors import RunError
from rwkv.files import replacing
from rwkv.training.distributed import sum_over_ranks
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


class StepLog(pl.Callback):
    """Sets the learning rates, adds up a step's numbers and reports them.

    Args:
        run_log: where lines go.
        schedule: of the learning rates.
        every: steps between lines.
        step_tokens: tokens of a step whose rows are all full; the display shows how full they are.
        loggers: Lightning loggers that get the numbers too.

    Attributes:
        stop_requested: read once a step; true on any rank stops all of them after it.
    """

    def __init__(
        self,
        run_log: RunLog,
        schedule: Schedule,
        *,
        every: int,
        step_tokens: int,
        loggers: list[Any],
    ):
        self.run_log, self.schedule, self.every = run_log, schedule, every
        self.step_tokens, self.loggers = step_tokens, loggers
        self.stop_requested = False
        self._tokens = 0
        self._ends_step = False
        self._since = time.perf_counter()
        self._bar: Any = None
        self._summed: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, lit: LitModel, stage: str) -> None:  # type: ignore[override]
        self.run_log.open(lit.first_step, trainer.is_global_zero)

    def on_train_start(self, trainer: pl.Trainer, lit: LitModel) -> None:  # type: ignore[override]
        self._since = time.perf_counter()
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
        """Add the step's numbers up over ranks and stop at a loss that is not finite."""
        if not self._ends_step:  # DeepSpeed calls this for every micro-batch
            return
        names = sorted(lit.step_sums)
        values = [lit.step_sums[name].double() for name in names]
        extra = [float(self._tokens), float(self.stop_requested)]
        device = values[0].device
        total = sum_over_ranks(
            torch.stack([*values, *torch.tensor(extra, dtype=torch.float64, device=device)])
        ).tolist()
        lit.step_sums = {}
        self._tokens = 0
        self._summed = dict(zip([*names, "tokens", "stop"], total, strict=True))
        if not math.isfinite(self._summed["loss"]):
            raise RunError(
                f"step {lit.steps_done + 1}: the loss is {self._summed['loss']}; lower --lr_init, "
                f"or look at the data; models saved so far are in {self.run_log.path.parent}"
            )
        if lit.strategy.startswith("deepspeed"):
            return
        params = (p for group in optimizer.param_groups for p in group["params"])
        self._summed["grad_norm"] = float(gradient_norm(params))

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, lit: LitModel, outputs: Any, batch: Any, index: int
    ) -> None:
        if not self._summed:
            return
        done = lit.steps_done
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        summed, self._summed = self._summed, {}
        if summed.pop("stop"):
            trainer.should_stop = True
        if "grad_norm" not in summed:
            engine: Any = trainer.model  # DeepSpeed's
            norm = engine.get_global_grad_norm()
            summed["grad_norm"] = float(norm) if norm is not None else 0.0
        tokens = int(summed.pop("tokens"))
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        line = {"step": done, **summed, "lr": max(rates)}
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
        if done % self.every == 0 or done == self.schedule.steps:
            self.run_log.add(line)
            for logger in self.loggers:
                numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
                logger.log_metrics(numbers, step=done)
        self._show(line)

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
        self._since = time.perf_counter()

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
