"""The benches of fused kernels run at tiny shapes on a CPU."""

import pytest

from rwkv.errors import InputError
from tests import bench_fused


def test_the_head_has_a_row_for_each_loss(capsys):
    """Along the way and with the head run again the gradients are the same, to rounding."""
    words = ["--device", "cpu", "--head", "48,32,64", "--dtype", "float32", "--repeats", "1"]
    assert bench_fused.main(words) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0].strip("| ") for row in rows] == ["SFT", "log-probabilities", "top-50 KL"]
    assert all(float(row[-1].rstrip(" |")) < 1e-5 for row in rows)


def test_sizes_that_are_no_numbers_are_named():
    with pytest.raises(InputError, match=r"^--head 3,4: is not n,C,V, three whole numbers$"):
        bench_fused.main(["--device", "cpu", "--head", "3,4"])
