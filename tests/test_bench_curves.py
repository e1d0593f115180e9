"""The benchmark of loss curves: its arithmetic by hand, and runs that fail among others."""

import os
import sys

import pytest

from tests import bench_curves
from tests.bench_curves import Apart, Curve, farthest, smooth
from tests.train_runs import flag_words, run_within


def test_windows_have_ten_steps_and_fewer_at_the_ends():
    """Step n of n = 1..20: from n - 5 to n + 4; the first from 1 to 5, the last from 15 to 20."""
    means = smooth(range(1, 21))
    assert means[0] == 3.0
    assert means[9] == sum(range(5, 15)) / 10
    assert means[-1] == 17.5


def test_the_largest_distance_is_found_above_the_floor():
    """0.1 of 2, 0.06 of 0.5, 0.01 of 0.02; the fourth step is of one curve alone."""
    one, want = [2.1, 0.56, 0.03, 9.0], [2.0, 0.5, 0.02]
    absolute = farthest(one, want, relative=False)
    assert absolute == Apart(pytest.approx(0.1), 1)
    assert farthest(one, want, relative=True) == Apart(pytest.approx(0.5), 3)
    assert farthest(one, want, relative=True, floor=0.1) == Apart(pytest.approx(0.12), 2)


def test_curves_are_judged_by_the_first_that_trained(tmp_path, capsys):
    """A kernel that failed is a line with its error; 0.5% is within the limit, 2% is not."""
    curves = {
        "cuda": Curve([], {}, 1.0, "error: no GPU"),
        "torch": Curve([2.0] * 20, {0: 2.0, 20: 1.5}, 1.0, ""),
        "triton": Curve([2.01] * 20, {0: 2.0, 20: 1.6}, 1.0, ""),
        "fla": Curve([2.04] * 12, {0: 2.0}, 1.0, "out of time after 9 s and 12 steps"),
    }
    bench_curves.compare("quickstart", curves, tmp_path / "curves.png")
    out = capsys.readouterr().out
    assert "| cuda |  |  |  |  | 1 | error: no GPU |" in out
    assert "| triton | 0.5% at 20 |" in out and "| 0.1 |" in out
    assert "unfinished: cuda, fla; within 1% of torch: triton; not within 1% of torch: fla" in out
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.parametrize(
    "code, seconds, want",
    [
        ("print('so')", 60, (0, "so")),
        ("import sys; sys.exit('error: so')", 60, (1, "error: so")),
        ("import time; print('begun', flush=True); time.sleep(60)", 2, (None, "begun")),
    ],
)
def test_a_command_ends_in_time_with_its_last_line(code, seconds, want, tmp_path):
    found = run_within(
        [sys.executable, "-c", code],
        seconds,
        cwd=tmp_path,
        log=tmp_path / "log",
        environment=os.environ,
    )
    assert found == want


def test_flags_become_words():
    assert flag_words({"sft": 1, "lr_init": 3e-3}) == ["--sft", "1", "--lr_init", "0.003"]


@pytest.mark.slow
def test_a_kernel_that_cannot_run_costs_only_its_own_line(tmp_path, monkeypatch, capsys):
    words = "--kernels torch fla --data quickstart --steps 3 --device cpu --work"
    monkeypatch.setattr(sys, "argv", ["bench_curves", *words.split(), str(tmp_path)])
    assert bench_curves.main() == 0
    out = capsys.readouterr().out
    assert "error: wkv7: --kernel fla cannot run here" in out
    assert "unfinished: fla; within 1% of torch: torch row by row" in out
