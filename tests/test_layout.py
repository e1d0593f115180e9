"""The repository's own rules: who may import whom, and that our folder names are ours."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {
    "rwkv": (),
    "losses": tuple(
        f"rwkv.{name}"
        for name in (
            "batch",
            "chunks",
            "errors",
            "flags",
            "gradients",
            "ops",
            "recompute",
            "scattered",
            "state",
        )
    ),
    "peft": ("rwkv",),
    "data": ("rwkv", "losses.logprobs", "losses.preference"),
}
ONLY_IN = {
    "pytorch_lightning": ("rwkv/training", "rwkv/run/fitting.py"),
    "deepspeed": ("rwkv/training",),
    "fla": ("rwkv/ops",),
    "triton": ("rwkv/ops", "peft"),
    "bitsandbytes": ("peft", "rwkv/training/optimizer.py"),
    "torchao": ("peft",),
    "h5py": ("data",),
}
COMMANDS = ("generate.py", "chat.py", "score.py", "runner.py")  # in rwkv/; they read adapters
RUN = Path("rwkv/run")  # puts a run together for train.py, from all folders
WORDS = re.compile(r"/(work|farm)/|TODO|FIXME|XXX")


def imports(folder: str) -> Iterator[tuple[Path, int, str]]:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path, node.lineno, node.module


@pytest.mark.parametrize("folder", OURS)
def test_imports_point_down(folder):
    for path, line, name in imports(folder):
        top, where = name.split(".")[0], f"{path.relative_to(ROOT)}:{line}"
        if top in OURS and top != folder:
            fine = any(name == ok or name.startswith(ok + ".") for ok in OURS[folder])
            fine |= folder == "rwkv" and path.name in COMMANDS and top == "peft"
            fine |= path.is_relative_to(ROOT / RUN)
            assert fine, f"{where}: {folder} may not import {name}"
        if f"{name}.".startswith("rwkv.run.") and folder != "rwkv":
            raise AssertionError(f"{where}: only train.py imports {name}")
        homes = ONLY_IN.get(top, (".",))
        fine = any(path.is_relative_to(ROOT / home) for home in homes)
        assert fine, f"{where}: {top} belongs in {' or '.join(homes)}"


@pytest.mark.parametrize("folder", OURS)
def test_our_folder_wins_over_a_package_of_that_name(folder):
    assert Path(importlib.import_module(folder).__file__).is_relative_to(ROOT)


def test_cuda_holds_no_python():
    """NVIDIA's namespace package is named cuda too; a module of ours would hide it from torch."""
    assert not list((ROOT / "cuda").rglob("*.py"))


def test_no_module_takes_a_standard_name():
    for folder in OURS:
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names, path


def test_help_needs_no_heavy_package():
    """--help answers at once: neither torch nor Lightning is imported for it."""
    code = (
        "import sys, train\n"
        "try: train.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pytorch_lightning', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--train_data_file" in done.stdout


def test_every_error_of_a_user_says_what_to_do():
    """`WHERE: WHAT; WHAT to do`, in each message that is written out where it is raised."""
    checked = 0
    for path in (path for folder in OURS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "id", "")
            if name not in ("InputError", "DataError", "RunError"):
                continue
            text = "".join(
                str(part.value) for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)
            )
            words = re.findall(r"[a-z]{3,}", text)
            if len(words) < 3:  # made of another message
                continue
            checked += 1
            where = f"{path.relative_to(ROOT)}:{node.lineno}: {text}"
            assert re.search(r"; |\?|needs? to be |is missing", text), where
    assert checked > 200


def test_no_place_of_one_machine_is_named():
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.sh", "*.json", "*.toml", "*.cu", "*.cuh", "*.txt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        if name == "tests/test_layout.py":
            continue
        found = WORDS.search((ROOT / name).read_text(encoding="utf-8"))
        assert not found, f"{name}: names {found.group()!r}"
