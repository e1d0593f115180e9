"""The commands of the example pages run, on a tiny model and few records."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_documents import commands
from test_infctx import byte_model

from rwkv.checkpoint import write_tensors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """Stands in for the quickstart's output: a base, a merged model, and few records."""
    folder = tmp_path_factory.mktemp("example")
    make = ["example/Quickstart/make_data.py", "--output", str(folder / "quickstart" / "data")]
    rows = ["--rows", "24", "--held_out", "12"]
    subprocess.run([sys.executable, *make, *rows], cwd=ROOT, check=True, capture_output=True)
    write_tensors(folder / "base.pth", byte_model(7).state_dict())
    shutil.copy(folder / "base.pth", folder / "quickstart" / "merged.pth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["StateTuning", "Distillation"])
def test_a_page_runs_from_top_to_bottom(name, stage):
    """Each command as it stands, but for the model's file, the output folder and the steps."""
    ran = 0
    for command in commands(ROOT / "example" / name / "README.md"):
        if "python -m " not in command and "train.py" not in command:
            continue
        command = re.sub(r"\bout/", f"{stage}/", command)
        command = command.replace("example/Quickstart/base.pth", str(stage / "base.pth"))
        command = re.sub(r"--epoch_steps \d+", "--epoch_steps 2 --num_workers 0", command)
        command = re.sub(r"\bpython\b", sys.executable, command)
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 3
