"""Learning rates over a run: a pure function of the step, so a resumed run goes on exactly."""

import math
from dataclasses import dataclass

from rwkv.errors import InputError

DECAY_SHARE = 0.2  # of the run in which "wsd" goes down, as in MiniCPM (arXiv:2404.06395)


@dataclass(frozen=True)
class Schedule:
    """The shape that every learning rate follows.

    kind: exponential (RWKV's), cosine, linear, wsd (warm-up, stable, decay) or constant.
    steps: optimizer steps of the whole run.
    warmup: steps in which the rate rises from 0.2 to 1 times its value.
    """

    kind: str
    steps: int
    warmup: int = 0

    def rate(self, step: int, initial: float, final: float) -> float:
        """The learning rate of a step, counted from 0, for a group that goes initial -> final."""
        progress = min(max(step - self.warmup, 0) / max(self.steps - self.warmup - 1, 1), 1.0)
        rise = 0.2 + 0.8 * step / self.warmup if step < self.warmup else 1.0
        return rise * self._value(progress, initial, final)

    def _value(self, progress: float, initial: float, final: float) -> float:
        if initial == final or self.kind == "constant":
            return initial
        if self.kind == "exponential":
            return initial * (final / initial) ** progress
        if self.kind == "cosine":
            return final + 0.5 * (initial - final) * (1 + math.cos(math.pi * progress))
        if self.kind == "linear":
            return initial + (final - initial) * progress
        fall = max(progress - (1 - DECAY_SHARE), 0) / DECAY_SHARE
        return initial + (final - initial) * fall


def check_rates(kind: str, initial: float, final: float, where: str) -> None:
    """Stop before a run whose learning rates are undefined.

    Raises:
        InputError: a rate is negative, or an exponential would start or end at 0.
    """
    if initial < 0 or final < 0:
        raise InputError(f"{where}: learning rates {initial:g} to {final:g}; use positive ones")
    if kind == "exponential" and initial != final and 0 in (initial, final):
        raise InputError(
            f"{where}: an exponential schedule cannot go from {initial:g} to {final:g}; "
            "use a small positive rate, or --lr_schedule linear"
        )
