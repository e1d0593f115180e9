"""The processes of a run, one a device: started together, and ended together when one dies."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from rwkv.errors import InputError, RunError
from rwkv.training.run_folder import newest

OTHERS = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
PATIENCE = 10.0  # seconds that a process has to end by itself when another failed


def is_started_elsewhere() -> bool:
    """Whether torchrun, or a cluster's own launcher, starts the processes of this run."""
    return any(environment.detect() for environment in OTHERS)


def is_child() -> bool:
    """Whether this process was started by `all_ranks` in another one."""
    return not is_started_elsewhere() and int(os.environ.get("LOCAL_RANK", "0")) > 0


def starts_itself() -> bool:
    """Whether this is the process that the user started, without a launcher."""
    return not is_started_elsewhere() and not is_child()


@contextlib.contextmanager
def all_ranks(devices: int, num_nodes: int, folder: Path) -> Iterator[None]:
    """Within the block a process runs for each device of this machine.

    The process that the user started is the first; it starts the others with its own command line,
    and they come to this place by themselves. If one dies the others are ended, for they would
    wait for it without end.

    Args:
        devices: processes on this machine.
        num_nodes: machines; each has its own first process, told apart by NODE_RANK.
        folder: of the run, whose resume points the message names.

    Raises:
        InputError: there are more machines, and no launcher says where.
        RunError: another process died; the message says which and how to go on.
    """
    if devices * num_nodes == 1:
        yield
        return
    if is_started_elsewhere() or is_child():
        if is_child():
            threading.Thread(target=_leave_with_parent, args=(folder,), daemon=True).start()
        else:
            _meet_anew()
        try:
            yield
        except BaseException:
            _leave_soon()
            raise
        _leave_group()
        return
    before = dict(os.environ)
    if num_nodes > 1 and not {"MASTER_ADDR", "NODE_RANK"} <= before.keys():
        raise InputError(
            f"--num_nodes {num_nodes}: the other machines are not known; start it by torchrun on "
            "each of them, as README.md shows"
        )
    os.environ |= {
        "MASTER_ADDR": before.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": before.get("MASTER_PORT", str(_free_port())),
        "NODE_RANK": before.get("NODE_RANK", "0"),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(devices * num_nodes),
    }
    children = _Children(devices, folder)
    try:
        yield
        _leave_group()
        children.wait()
    except (InputError, RunError, KeyboardInterrupt):
        _leave_soon()
        raise
    except Exception as error:
        _leave_soon()
        died = children.first_to_die(3.0)
        if died is not None:
            raise RunError(children.message(died)) from error
        raise
    finally:
        children.kill()
        _leave_group()
        os.environ.clear()
        os.environ |= before


class _Children:
    """The processes of ranks 1 and up on this machine, and a thread that watches them."""

    def __init__(self, devices: int, folder: Path):
        self.folder = folder
        self.over = threading.Event()
        # each reads from a pipe of this process, and leaves when it is closed: see below
        self.processes = {
            rank: subprocess.Popen(
                _own_command(),
                env=os.environ | {"LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
            )
            for rank in range(1, devices)
        }
        threading.Thread(target=self._watch, daemon=True).start()

    def first_to_die(self, seconds: float = 0.0) -> int | None:
        """The rank of a process that ended badly, looked for during some seconds."""
        until = time.monotonic() + seconds
        while True:
            for rank, process in self.processes.items():
                if process.poll() not in (None, 0):
                    return rank
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)

    def message(self, rank: int) -> str:
        """What happened to a rank, and how to go on."""
        status = self.processes[rank].returncode
        how = f"ended with status {status}"
        if status < 0:
            how = f"was killed ({signal.Signals(-status).name})"
        return _how_to_go_on(rank, how, self.folder)

    def wait(self) -> None:
        """Wait for all of them.

        Raises:
            RunError: one ended badly.
        """
        for process in self.processes.values():
            process.wait()
        died = self.first_to_die()
        if died is not None:
            raise RunError(self.message(died))

    def kill(self) -> None:
        """End what still runs; nothing is watched any more."""
        self.over.set()
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()

    def _watch(self) -> None:
        """End this process if another died: the main thread waits for it and hears nothing."""
        while not self.over.wait(0.2):
            died = self.first_to_die()
            if died is None:
                continue
            # after an error that all have, the main thread ends with a message of its own
            failed_alone = self.processes[died].returncode < 0
            if self.over.wait(1.0 if failed_alone else PATIENCE):
                return
            for process in self.processes.values():
                process.kill()
            sys.stderr.write(f"\nerror: {self.message(died)}\n")
            sys.stderr.flush()
            os._exit(1)


def _own_command() -> list[str]:
    """The command line of this process."""
    module = sys.modules["__main__"].__spec__
    if module is None:
        return [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]
    return [sys.executable, "-m", module.name.removesuffix(".__main__"), *sys.argv[1:]]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _how_to_go_on(rank: int, how: str, folder: Path) -> str:
    point = newest(folder)
    step = "" if point is None else point.name.removeprefix("step-")
    then = (
        "no resume point was written before; --resume_every N writes one every N steps"
        if point is None
        else f"go on from step {step} with the same flags and --resume 1"
    )
    return f"rank {rank}: its process {how}, and the others were stopped; {then}"


def _leave_with_parent(folder: Path) -> None:
    """End this process when the one that started it is gone, even by kill -9; rank 1 says so."""
    os.read(0, 1)  # nothing is ever written: it returns when the pipe's other end is closed
    if os.environ["LOCAL_RANK"] == "1":
        print(f"\nerror: {_how_to_go_on(0, 'was killed', folder)}", file=sys.stderr)  # noqa: T201
    os._exit(1)


_meetings = count()


def _meet_anew() -> None:
    """Have the processes of torchrun meet at a port of their own from their second run on.

    In torchrun's own store they would read what the group of the run before has left there.
    """
    number = next(_meetings)
    if number and "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def _leave_group() -> None:
    """Take leave of the other ranks, which NCCL waits for: all do it before any waits otherwise.

    DeepSpeed forgets its groups too, for this process may have a next run.
    """
    if not torch.distributed.is_initialized():
        return
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    if comm is not None and comm.cdb is not None:
        comm.destroy_process_group()
        comm.cdb = None
    else:
        torch.distributed.destroy_process_group()


def _leave_soon() -> None:
    """End this process if its way out hangs in a sum that another rank will never join."""
    timer = threading.Timer(PATIENCE, os._exit, (1,))
    timer.daemon = True
    timer.start()
