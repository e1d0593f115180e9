"""The bench of launch settings, in Triton's interpreter, and what it refuses."""

import os

import pytest
import torch
from helpers import pass_in_the_interpreter

from rwkv.errors import InputError

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="runs the other")
def test_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-k", "neighbour")


@pytest.mark.skipif(not INTERPRETED, reason="runs in another process")
def test_each_neighbour_has_a_row_and_the_settings_stay(capsys):
    from rwkv.ops import low_rank_triton
    from tests import bench_launch

    before = {key: dict(used) for key, used in low_rank_triton.LAUNCH.items()}
    words = "low_rank --device cpu --dtype float32 --rank 16 --shape 8,64 --repeats 1"
    assert bench_launch.main(words.split()) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    used = before[4, 16]
    assert [row[0].strip("| ") for row in rows] == ["all", *(name for name in used for _ in "ab")]
    assert all(float(row[-1].rstrip(" |")) < 1e-6 for row in rows)
    assert before == low_rank_triton.LAUNCH


@pytest.mark.skipif(INTERPRETED, reason="asks for the interpreter")
@pytest.mark.parametrize(
    ("shape", "interpreted", "message"),
    [
        ("8,64", False, "--device cpu: needs Triton's interpreter; set TRITON_INTERPRET=1"),
        ("8,64", True, "--shape 8,64: is not numbers such as 8,4096,32"),
        ("8,x,2", True, "--shape 8,x,2: is not numbers such as 8,4096,32"),
    ],
)
def test_what_it_cannot_run_is_named(shape, interpreted, message, monkeypatch):
    from rwkv.ops import triton_chunks
    from tests import bench_launch

    monkeypatch.setattr(triton_chunks.INTERPRETED, "value", interpreted)
    with pytest.raises(InputError, match=f"^{message}$"):
        bench_launch.main(["wkv7", "--device", "cpu", "--shape", shape])
