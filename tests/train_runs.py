"""What benches share that start train.py: flags as words, a time limit, the losses it logged."""

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """A command line, `--name value` for each flag."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run_within(
    command: Sequence[str],
    seconds: float,
    *,
    cwd: Path,
    log: Path,
    environment: Mapping[str, str],
) -> tuple[int | None, str]:
    """Run a command, and end it with all that it started if it takes too long or fails.

    Args:
        command: the words of the command.
        seconds: the limit.
        cwd: where it runs.
        log: the file that the command and its output are appended to.
        environment: of the process, whole.

    Returns:
        its exit status, None if it ran out of time; and the log's last line.
    """
    with log.open("a") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None or status != 0:
                end_group(process.pid)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return status, lines[-1][:160]


def end_group(pid: int) -> None:
    """Kill a process and all that share its group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """What the run in a --proj_dir logged of its training steps, in order."""
    from rwkv.training.step_log import read_log

    return [line for line in read_log(run / "train_log.jsonl") if "loss" in line]
