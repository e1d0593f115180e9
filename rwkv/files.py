"""Write files so that a kill, a full disk or an error never leaves half of one."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rwkv.errors import InputError

REFUSALS = (
    errno.EACCES,
    errno.EEXIST,
    errno.EFBIG,  # of some file systems, and of ulimit -f
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a path beside `path`; what is written there takes its name when the block ends well.

    A file or a folder may be written; a folder never gives way to a file. If the block fails, what
    it wrote is removed and whatever stood at `path` before is untouched.

    Raises:
        InputError: the disk is full, the folder cannot be written, or `path` is a folder where a
            file is to go.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(beside)
        yield beside
        sync(beside)
        if path.is_dir() and beside.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            beside.rename(path)
            shutil.rmtree(old)
        else:
            beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(beside)
        if out_of_space(error):
            raise InputError(
                f"{path}: no space left on the device; free some or choose another folder"
            ) from error
        if isinstance(error, OSError) and (
            error.errno in REFUSALS
            or not path.parent.is_dir()  # as below /proc
            or (isinstance(error, FileNotFoundError) and str(error.filename) == str(beside))
        ):
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); choose another folder"
            ) from error
        raise


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block no other process on this machine claims the folder, which is made.

    Where the system has no locks, as Windows and some network file systems, nothing is claimed.

    Raises:
        InputError: another process has claimed it, or it cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    with file:
        if not _lock(file):
            raise InputError(
                f"{folder}: another run is at work in it; wait for it, or choose another folder"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(file: IO[str]) -> bool:
    """Lock an open file until it is closed or the process ends; whether nobody else has."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def out_of_space(error: BaseException) -> bool:
    """Whether a full disk caused `error`; torch and safetensors report it in classes of theirs."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return "No space left" in text or (
        isinstance(error, RuntimeError)
        and ("file write failed" in text or "unexpected pos" in text)
    )


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or every file of a folder, to the disk before it is renamed."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
