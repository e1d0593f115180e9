"""Files are written whole or not at all: errors, full disks, kills, folders."""

import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv.checkpoint import read_metadata, read_tensors, write_tensors
from rwkv.errors import InputError
from rwkv.files import claimed, replacing

ROOT = Path(__file__).resolve().parent.parent


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as part:
        part.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "resume"
    for content in ("old", "new"):
        with replacing(path) as part:
            part.mkdir()
            (part / f"{content}.txt").write_text(content)
    assert [file.name for file in path.iterdir()] == ["new.txt"]
    with pytest.raises(ValueError), replacing(path) as part:
        part.mkdir()
        (part / "third.txt").write_text("third")
        raise ValueError
    assert [file.name for file in path.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_never_gives_way_to_a_file(tmp_path):
    (tmp_path / "out.pth").mkdir()
    (tmp_path / "out.pth" / "precious").touch()
    with pytest.raises(InputError, match="out.pth: cannot be written .*; choose another folder"):
        write_tensors(tmp_path / "out.pth", {"a": torch.ones(1)})
    assert [path.name for path in tmp_path.rglob("*")] == ["out.pth", "precious"]


def test_folders_are_made(tmp_path):
    with replacing(tmp_path / "a" / "b" / "c.txt") as part:
        part.write_text("x")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "a").touch()
    for path in (tmp_path / "a" / "b.txt", tmp_path / "a" / "b" / "c.txt"):
        with pytest.raises(InputError, match="txt: cannot be written"), replacing(path):
            pass


def test_a_file_above_a_limit(tmp_path):
    (tmp_path / "a").write_text("before")
    with (
        pytest.raises(InputError, match="a: cannot be written .File too large.; choose another"),
        replacing(tmp_path / "a") as beside,
    ):
        beside.write_text("half")
        raise OSError(errno.EFBIG, "File too large")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")
def test_a_folder_that_cannot_be_made():
    with pytest.raises(InputError, match="cannot be written"), replacing("/proc/no/b.txt"):
        pass


def test_a_folder_without_rights(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(InputError, match="cannot be written .Permission denied.; choose another"),
        replacing(tmp_path / "a.txt"),
    ):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_full_disk_is_named_and_keeps_the_old_file(small_disk, name):
    path = small_disk / name
    write_tensors(path, {"a": torch.ones(3)})
    with pytest.raises(InputError, match="no space left on the device; free some or choose"):
        write_tensors(path, {"a": torch.ones(1_000_000)})
    assert torch.equal(read_tensors(path)["a"], torch.ones(3))
    assert list(small_disk.iterdir()) == [path]


def test_a_full_disk_under_any_writer(tmp_path):
    path = tmp_path / "a.txt"
    with (
        pytest.raises(InputError, match="a.txt: no space left on the device"),
        replacing(path) as part,
    ):
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from rwkv.checkpoint import write_tensors

def save_half(tensors, handle):
    handle.write(b"PK" + bytes(1000))
    handle.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
write_tensors(Path(sys.argv[1]), {"a": torch.zeros(3)})
"""


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    write_tensors(path, {"a": torch.ones(3)})
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert torch.equal(read_tensors(path)["a"], torch.ones(3))


def write_until(call: int, path: Path, step: int) -> int:
    """Write in a process that ends before a rename or removal, counted from 0; its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls = itertools.count()

    def ending(real):
        return lambda *args, **more: os._exit(9) if next(calls) == call else real(*args, **more)

    try:
        Path.replace, Path.unlink = ending(Path.replace), ending(Path.unlink)
        write_tensors(path, {"a": torch.tensor([step])}, {"kind": "adapter", "step": step})
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("before", [False, True], ids=["new", "written over"])
def test_tensors_never_have_the_json_of_others(tmp_path, before):
    """Killed between any two changes of names; the next write of that file goes well."""
    for call in itertools.count():
        path = tmp_path / str(call) / "a.pth"
        if before:
            write_tensors(path, {"a": torch.tensor([1])}, {"kind": "adapter", "step": 1})
        status = write_until(call, path, 2)
        if path.exists():
            assert read_metadata(path)["step"] == read_tensors(path)["a"].item()
        assert write_until(-1, path, 3) == 0 and read_metadata(path)["step"] == 3
        if status == 0:
            break
        assert status == 9
    assert call > 3


def test_a_folder_is_claimed_by_one_process(tmp_path):
    """Until its end, however that comes; nothing stays behind."""
    folder = tmp_path / "run"
    code = (
        "import pathlib, sys\n"
        "from rwkv.files import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])):\n"
        "    print('claimed', flush=True)\n"
        "    input()\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(InputError, match="run: another run is at work in it"), claimed(folder):
            pass
        other.kill()
    with claimed(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), claimed(tmp_path / "file" / "run"):
        pass


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no files")
def test_a_file_where_none_can_be_is_named():
    with pytest.raises(InputError, match="/proc/x.pth: cannot be written"):
        write_tensors("/proc/x.pth", {"a": torch.ones(1)})
