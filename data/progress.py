"""A line on stderr while something takes long: how far, how fast, how much time is left."""

import sys
import time

QUIET_SECONDS = 2.0
TERMINAL_SECONDS = 0.5
LOG_SECONDS = 30.0


class Progress:
    """Reports on `what`; silent for work of less than QUIET_SECONDS.

    On a terminal one line is rewritten, elsewhere a new one is written now and then.
    """

    def __init__(self, what: str):
        self.what = what
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._next = self._start + QUIET_SECONDS
        self._written = False

    def __call__(self, done: int, total: int, records: int) -> None:
        """Report `done` of `total` bytes and the records in them."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
        passed = now - self._start
        left = passed * (total - done) / done if done else 0.0
        self._write(
            f"{self.what}: {done / total:.0%}, {records:,} records, "
            f"{records / passed:,.0f} a second, {clock(left)} left"
        )

    def finish(self) -> None:
        """End the rewritten line, if there is one."""
        if self._written and self._terminal:
            sys.stderr.write("\n")
            sys.stderr.flush()

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r\033[K{text}" if self._terminal else f"{text}\n")
        sys.stderr.flush()
        self._written = True


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
