"""The benchmark of a training step, on a model small enough for a CPU."""

import math

import pytest
import torch

from tests import bench_step, bench_through
from tests.bench_step import Row, flops_of_token, group_of, line, measure


@pytest.mark.parametrize("mode", ["full", "lora", "bone"])
@pytest.mark.parametrize("version", [6, 7])
def test_every_kind_of_row_trains(mode, version):
    """Random tokens of V = 256: the loss stays near log V."""
    row = Row(mode, 1, 128, rows=1, version=version, tokens=32, vocabulary=256)
    found = measure(row, "cpu", steps=1)
    assert found.step == pytest.approx(found.forward + found.backward + found.optimizer)
    assert found.loss == pytest.approx(math.log(256), rel=0.2)
    assert line("lora-1.5B-8", row, found).count("x") == 2


@pytest.mark.parametrize(
    "name, want", [("full-1.5B-8", 8.45), ("full-2.9B-8", 16.84), ("lora-1.5B-8", 5.98)]
)
def test_flops_of_a_token_are_those_of_the_peers_table(name, want):
    """GFLOP a token: their TFLOP/s over their tokens a second (274 / 32,385 and so on).

    LoRA: 4 (1261.4M + 134.2M) + 6 * 50.3M of adapters + the wkv operator's 84.9M, by hand.
    """
    row = bench_step.ROWS[name]
    with torch.device("meta"):
        model = bench_step.RWKV(row.config())
        bench_step.adapt(model, row)
    assert flops_of_token(row, model) / 1e9 == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize(
    "kernel, group",
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
        ("void at::native::multi_tensor_apply_kernel<...>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<8, ...>", "other element-wise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("some_kernel", "fused"),
    ],
)
def test_kernels_fall_into_groups(kernel, group):
    assert group_of(kernel, {"some_kernel": "fused"}) == group


def test_train_py_is_set_beside_the_bare_step(tmp_path, capsys):
    """Three lines with numbers; the profile names the host's functions."""
    row = Row("lora", 1, 128, rows=2, tokens=32, vocabulary=256)
    steps = bench_through.SKIPPED + 1
    watched = bench_through.Watched("cpu", first=1)
    bench_through.prepare(row, tmp_path, "cpu", watched.steps)
    bench_through.compare(row, tmp_path, "cpu", steps, ["full", "packed", "auto"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert [line.split()[0] for line in lines] == ["full", "packed", "auto"]
    assert lines[-1].count(" of ") == 2
    bench_through.profile(row, tmp_path, "cpu", "auto", watched)
    assert "run_backward" in capsys.readouterr().out


def test_pauses_are_what_no_kernel_covers():
    """0..4 and 2..3 overlap, 6..7 comes after a gap of 2, 7..10 after none: 2 of 10."""
    spans = [(6.0, 7.0, "c"), (0.0, 4.0, "a"), (2.0, 3.0, "b"), (7.0, 10.0, "d")]
    assert bench_through.pauses(spans) == (0.2, [(2.0, "a", "c")])
