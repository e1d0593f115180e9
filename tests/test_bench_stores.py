"""The benchmark of stores: what it imitates, leaves out and reads."""

import argparse
import sys

import pytest
import torch

from peft.apply import random_with_profile
from peft.store_fp8 import native_gradient, native_product
from peft.stores import make_store
from rwkv.config import LowRanks, RWKVConfig
from rwkv.init import initialize
from rwkv.model import RWKV
from tests import bench_stores
from tests.bench_memory import SHAPES
from tests.bench_stores import RoundedFp8, relative, tokens_of, weights_of, whole_models

CONFIG = RWKVConfig(
    version=7, n_layer=2, n_embd=64, dim_ffn=256, vocab_size=64, head_size=16,
    ranks=LowRanks(8, 8, 8, 8),
)  # fmt: skip


def test_rounded_fp8_gives_the_native_products():
    """But for their sums' last rounding, to 8 bits of mantissa."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=draw) * torch.logspace(-2, 0, 96).unsqueeze(1)
    store = RoundedFp8("fp8", weight)
    x = torch.randn(2, 5, 256, generator=draw)
    grad = torch.randn(2, 5, 96, generator=draw)
    native = native_product(x, store.codes, store.scale)
    assert relative(store.forward_product(x), native) < 2**-8
    native = native_gradient(grad, store.codes, store.scale)
    assert relative(store.backward_product(grad), native) < 2**-8
    dense = make_store("fp8", weight).dense(torch.float32)
    assert relative(store.forward_product(x), x @ dense.T) > 0.02


def test_weights_of_zeros_are_left_out():
    """A new model's output and ffn.value are zeros: 4 of 6 linear layers of a block are left."""
    model = RWKV(CONFIG)
    initialize(model)
    assert len(weights_of(model, "cpu")) == 2 * 4


@pytest.mark.parametrize("text", [True, False])
def test_scored_tokens_follow_the_context(text, tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(range(20)))
    options = argparse.Namespace(context=3, tokens=4)
    context, scored = tokens_of(64, str(file) if text else "", options)
    assert context.shape == (1, 3) and scored.shape == (1, 5)
    if text:
        assert context.tolist() == [[0, 1, 2]] and scored.tolist() == [[3, 4, 5, 6, 7]]


def test_cosines_fall_as_the_error_of_the_weights_grows(capsys):
    options = argparse.Namespace(context=16, tokens=32)
    whole_models(
        "small",
        lambda flags, dtype: random_with_profile(CONFIG, flags, dtype=dtype)[0],
        tokens_of(64, "", options),
        "cpu",
    )
    rows = {line[:15].strip(): line[15:].split() for line in capsys.readouterr().out.splitlines()}
    cosines = {kind: float(rows[kind][2]) for kind in ("int8", "fp6_e2m3", "fp6", "nf4", "fp4")}
    assert list(cosines.values()) == sorted(cosines.values(), reverse=True)
    assert 0.5 < cosines["fp4"] < cosines["int8"] < 1
    assert float(rows["none, bfloat16"][4]) == 0 and float(rows["nf4"][4]) > 0.08


def test_a_quantized_file_gives_the_logits_of_quantizing_at_load(monkeypatch, tmp_path, capsys):
    """The whole command, which says first what it was told and what it takes for the rest."""
    monkeypatch.setitem(SHAPES, "small", (1, 64))
    words = ["load", "--shapes", "small", "--stores", "int8,nf4", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_stores", *words])
    assert bench_stores.main() == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"python -m tests.bench_stores {' '.join(words)} --seconds 110.0"
    rows = {line.split()[0]: line.split() for line in lines[-3:]}
    assert list(rows) == ["none", "int8", "nf4"] and not list(tmp_path.iterdir())
    assert rows["int8"][-1] == rows["nf4"][-1] == "yes"


def test_memory_of_the_host_is_seen():
    with bench_stores.Peak() as peak:
        kept = torch.ones(2**24)
    assert peak.host == pytest.approx(kept.nbytes, rel=0.2) and peak.seconds > 0
