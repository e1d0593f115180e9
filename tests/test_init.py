"""New models: values worked out by hand from RWKV-LM's formulas, and what the draws are like."""

import json
import math

import pytest
import torch

import peft.apply
from peft.apply import new_with_profile, random_with_profile
from peft.flags import PeftFlags
from peft.plan import Plan
from rwkv.config import LowRanks, RWKVConfig, default_ranks
from rwkv.init import initialize, is_decayed, learning_rate_factor
from rwkv.linear import Linear
from rwkv.model import RWKV

versions = pytest.mark.parametrize("version", [6, 7], ids=["v6", "v7"])
HAND = {  # two layers, C = 4, N = 2, n / (C - 1) = 0, 1/3, 2/3, 1
    "7 blocks.0.att.w0": [-8, -1, -4, 3],
    "7 blocks.1.att.w0": [-8, -2.333333, -5.333333, 3],
    "7 blocks.0.att.a0": [-0.69, 0.043333, -0.423333, 0.31],
    "7 blocks.1.att.v0": [0.93, 0.796667, 0.663333, 0.53],
    "7 blocks.0.att.k_k": [0.76, 0.726667, 0.693333, 0.66],
    "7 blocks.0.att.k_a": [1.02] * 4,
    "7 blocks.0.att.r_k": [-0.04] * 4,
    "7 blocks.0.att.w1": [0] * 12,
    "7 blocks.1.att.v1": [0] * 12,
    "7 blocks.0.att.x_r": [1, 1 - 0.25**0.2, 1 - 0.5**0.2, 1 - 0.75**0.2],
    "7 blocks.1.att.x_k": [1, 1 - 0.25**0.35, 1 - 0.5**0.35, 1 - 0.75**0.35],
    "7 blocks.1.ffn.x_k": [1, 1 - 0.25**0.0625, 1 - 0.5**0.0625, 1 - 0.75**0.0625],
    "7 blocks.0.att.ln_x.weight": [0.5**0.7] * 4,
    "7 blocks.1.att.ln_x.weight": [1] * 4,
    "7 blocks.1.att.output.weight": [0] * 16,
    "7 blocks.1.ffn.value.weight": [0] * 64,
    "6 blocks.0.att.time_decay": [-6, -6 + 5 * (1 / 3) ** 0.7, -6 + 5 * (2 / 3) ** 0.7, -1],
    "6 blocks.1.att.time_decay": [-6, -5.444444, -3.777778, -1],
    "6 blocks.0.att.time_faaaa": [0, 0.1, -0.1, 0],
    "6 blocks.1.att.time_faaaa": [1, 0.766667, 0.233333, 0],
    "6 blocks.0.att.time_maa_x": [1, 0.75, 0.5, 0.25],
    "6 blocks.1.att.time_maa_v": [0.7, 0.2, 0.7 - 0.5**0.5, 0.7 - 0.75**0.5],
    "6 blocks.1.att.time_maa_g": [1, 1 - 0.25**0.25, 1 - 0.5**0.25, 1 - 0.75**0.25],
    "6 blocks.0.att.time_maa_w1": [0] * 60,
    "6 blocks.0.att.time_decay_w1": [0] * 12,
    "6 blocks.1.ffn.time_maa_r": [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5],
    "6 blocks.1.ffn.receptance.weight": [0] * 16,
    "6 blocks.0.att.ln_x.weight": [0.5**0.7] * 4,
}


def new_model(version: int, *, C=4, N=2, V=8, rank=3, seed=0) -> RWKV:
    """Two layers, initialized over values that are no numbers."""
    config = RWKVConfig(
        version=version,
        n_layer=2,
        n_embd=C,
        dim_ffn=4 * C,
        vocab_size=V,
        head_size=N,
        ranks=LowRanks(decay=rank, iclr=rank, value=rank, gate=rank, mix=rank),
    )
    model = RWKV(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    initialize(model, seed)
    return model


@pytest.mark.parametrize("name", HAND)
def test_by_hand(name):
    version, key = name.split()
    parameter = dict(new_model(int(version)).named_parameters())[key]
    assert parameter.flatten().tolist() == pytest.approx(HAND[name], abs=1e-5)


@versions
def test_every_parameter_is_filled(version):
    for name, parameter in new_model(version).named_parameters():
        assert parameter.isfinite().all(), name


@versions
def test_a_seed_gives_one_model(version):
    models = [dict(new_model(version, seed=seed).named_parameters()) for seed in (1, 1, 2)]
    for name, parameter in models[0].items():
        assert torch.equal(parameter, models[1][name]), name
    assert not torch.equal(models[0]["head.weight"], models[2]["head.weight"])


@versions
def test_the_blocks_of_a_new_model_add_nothing(version):
    """Its output layers are zero, so that a token's own embedding is all that the head sees."""
    model = new_model(version, C=8, N=4)
    hidden, _ = model(torch.tensor([[1, 2, 3, 2]]))
    alone = model.ln_out(model.blocks[0].ln0(model.emb(torch.tensor([1, 2, 3, 2]))))
    torch.testing.assert_close(hidden[0], alone)


@versions
def test_matrices_are_orthogonal_with_the_published_gains(version):
    model = new_model(version, C=32, N=8, V=128, rank=16)
    att, ffn = model.blocks[1].att, model.blocks[1].ffn
    one = torch.eye(32)

    def gram(weight):
        return weight.mT @ weight

    for weight, gain in (
        (model.head.weight, 0.5 * math.sqrt(128 / 32)),
        (att.receptance.weight, 1.0),
        (att.key.weight, 0.1),
        (att.value.weight, 1.0),
        (ffn.key.weight, 1.0),
        *([(att.gate.weight, 0.1)] if version == 6 else []),
    ):
        torch.testing.assert_close(gram(weight), gain**2 * one, rtol=1e-4, atol=1e-4)
    if version == 7:
        for name in "wavg":
            weight = getattr(att, f"{name}2")
            torch.testing.assert_close(gram(weight.mT), 0.01 * torch.eye(16), atol=1e-5, rtol=1e-4)


@versions
def test_uniform_draws_fill_their_range(version):
    model = new_model(version, C=64, N=8, V=256, rank=16)
    bounds = {"emb.weight": 1e-4}
    if version == 6:
        bounds |= {"blocks.1.att.time_maa_w2": 0.01, "blocks.0.att.time_decay_w2": 0.01}
    parameters = dict(model.named_parameters())
    for name, bound in bounds.items():
        weight = parameters[name]
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(weight.mean().item()) < 0.1 * bound


def test_a_wide_low_rank_matrix_keeps_its_gain():
    """rank 16 over 4 channels: the columns have length 0.1 sqrt(16 / 4)."""
    weight = new_model(7, rank=16).blocks[0].att.w2
    torch.testing.assert_close(weight.mT @ weight, 0.04 * torch.eye(4), atol=1e-6, rtol=1e-4)


def test_ranks_of_new_models():
    """RWKV-7: 2.5, 1.7 and 5 times the root of C, to the nearest multiple of 32, at least 32."""
    assert default_ranks(7, 768) == LowRanks(decay=64, iclr=64, value=32, gate=128)
    assert default_ranks(7, 2048) == LowRanks(decay=128, iclr=128, value=64, gate=224)
    assert default_ranks(7, 64) == LowRanks(decay=32, iclr=32, value=32, gate=32)
    assert default_ranks(6, 2048) == LowRanks(decay=64, mix=32)
    assert default_ranks(6, 4096) == LowRanks(decay=128, mix=64)


@versions
def test_parameter_groups(version):
    """Twice the rate for the decay's offset; weight decay for embedding, head and linear layers."""
    parameters = dict(new_model(version).named_parameters())
    fast = {name for name in parameters if learning_rate_factor(name) == 2}
    offset = {6: "time_decay", 7: "w0"}[version]
    assert fast == {f"blocks.{layer}.att.{offset}" for layer in range(2)}
    decayed = {name for name, parameter in parameters.items() if is_decayed(name, parameter)}
    linear = {"att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"}
    linear |= {"att.gate", "ffn.receptance"} if version == 6 else set()
    expected = {f"blocks.{layer}.{name}.weight" for layer in range(2) for name in linear}
    assert decayed == expected | {"emb.weight", "head.weight"}


@pytest.mark.parametrize("version", [6, 7])
def test_a_model_made_block_by_block_is_the_model_made_at_once(version):
    config = RWKVConfig(
        version=version, n_layer=3, n_embd=32, dim_ffn=64, vocab_size=48, head_size=16,
        ranks=LowRanks(8, 8, 8, 8, 8),
    )  # fmt: skip
    whole = RWKV(config)
    initialize(whole, seed=4)
    made, _ = new_with_profile(config, PeftFlags(), dtype=torch.bfloat16, seed=4)
    for name, parameter in whole.named_parameters():
        assert torch.equal(made.get_parameter(name), parameter.bfloat16())


@pytest.mark.parametrize("make", [new_with_profile, random_with_profile])
def test_one_block_is_dense_at_a_time(make, tmp_path, monkeypatch):
    """So that a model of any size is made in the memory of its stores."""
    config = RWKVConfig(
        version=7, n_layer=3, n_embd=32, dim_ffn=64, vocab_size=48, head_size=16,
        ranks=LowRanks(8, 8, 8, 8),
    )  # fmt: skip
    profile = tmp_path / "p.json"
    rule = {"match": ["blocks.*", "head"], "mode": "lora", "rank": 4, "quant": "int8"}
    profile.write_text(json.dumps({"rules": [rule]}))
    most, install = 0, peft.apply.install

    def counting(model: RWKV, name: str, plan: Plan) -> None:
        nonlocal most
        linears = (m for m in model.modules() if isinstance(m, Linear) and m.weight is not None)
        most = max(most, sum(not linear.weight.is_meta for linear in linears))
        install(model, name, plan)

    monkeypatch.setattr(peft.apply, "install", counting)
    model, _ = make(config, PeftFlags(layer_profile=str(profile)))
    assert most <= 6 and not any(parameter.is_meta for parameter in model.parameters())
    assert all(m.store is not None for m in model.modules() if isinstance(m, Linear))
