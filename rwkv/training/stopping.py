"""Stop a run after the step that it is in, when a signal asks for it."""

import signal
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import SIGTERMException

from rwkv.training.lit import LitModel
from rwkv.training.step_log import StepLog

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 1.0  # seconds in which a second signal is the first: timeout and torchrun may send it twice


class Stopping(pl.Callback):
    """SIGINT and SIGTERM ask to finish the step and save; a second signal takes its usual course.

    It is the first callback, for what others do before the first step may take long, and the
    context in which the trainer fits: after it the signals do what they did before.

    Args:
        step_log: is told which signal this process got, and has the ranks agree.
    """

    def __init__(self, step_log: StepLog):
        self.step_log = step_log
        self._usual: dict[int, Any] = {}
        self._asked = 0.0

    def __enter__(self) -> "Stopping":
        self._usual = {number: signal.getsignal(number) for number in SIGNALS}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._restore()
        if isinstance(error, SystemExit):  # Lightning's way out at a signal that nothing caught
            before_ours = isinstance(error, SIGTERMException)
            signal.raise_signal(signal.SIGTERM if before_ours else signal.SIGINT)

    def on_train_start(self, trainer: pl.Trainer, lit: LitModel) -> None:  # type: ignore[override]
        for number in SIGNALS:  # in the place of Lightning's own, which would leave unsaved
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.step_log.stop_requested:
            self.step_log.stop_requested, self._asked = number, now
        elif now - self._asked > ECHO:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
