"""Rules of layer profiles: what they mean for a model, and what is said about mistakes in them."""

import json
from pathlib import Path

import pytest
import torch

from peft.apply import install, mark_trained
from peft.flags import PeftFlags
from peft.groups import parameter_groups, unheard_rates
from peft.layer_profile import LayerPlan, read_profile
from peft.plan import describe, make_plan, model_layers, stored_bytes, trained_count
from rwkv.config import LowRanks, RWKVConfig
from rwkv.errors import InputError
from rwkv.model import RWKV
from rwkv.training.flags import OptimizerFlags

SHIPPED = sorted((Path(__file__).parent.parent / "layerprofile").glob("*.json"))
CONFIGS = {
    version: RWKVConfig(
        version=version,
        n_layer=3,
        n_embd=64,
        dim_ffn=224 if version == 6 else 256,
        vocab_size=96,
        head_size=16,
        ranks=LowRanks(8, 8, 8, 8, 8),
    )
    for version in (6, 7)
}


def blank(version: int = 7) -> RWKV:
    with torch.device("meta"):
        return RWKV(CONFIGS[version], "reference")


def write(tmp_path: Path, *rules: dict) -> str:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"rules": rules}))
    return str(path)


def plan_of(tmp_path: Path, *rules: dict, version: int = 7, **flags):
    return make_plan(blank(version), PeftFlags(layer_profile=write(tmp_path, *rules), **flags))


def modes(plan, fragment: str) -> set[str]:
    return {plan.plans[name].mode for name in plan.layers if fragment in name}


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profiles_suit_both_versions(path, version):
    plan = make_plan(blank(version), PeftFlags(layer_profile=str(path)))
    tunes_state = any(mine.state_lr_init for mine in plan.plans.values())
    assert trained_count(plan) > 0 or tunes_state
    assert json.loads(path.read_text())["about"]


@pytest.mark.parametrize("version", [6, 7])
def test_every_parameter_belongs_to_one_layer(version):
    model = blank(version)
    owned = [name for layer in model_layers(model).values() for name in layer.parameters]
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters())


def test_without_a_profile_everything_trains():
    plan = make_plan(blank(), PeftFlags())
    assert trained_count(plan) == sum(p.numel() for p in blank().parameters())


def test_later_rule_holds_key_by_key(tmp_path):
    plan = plan_of(
        tmp_path,
        {"match": "*", "mode": "lora", "rank": 8, "alpha": 16, "lr_init": 1e-4},
        {"match": "blocks.1.*", "rank": 16},
    )
    keys, other = plan.plans["blocks.0.att.key"], plan.plans["blocks.1.att.key"]
    assert (keys.rank, other.rank) == (8, 16)
    assert (other.mode, other.alpha, other.lr_init) == ("lora", 16, 1e-4)


def test_match_may_be_a_list(tmp_path):
    rule = {"match": ["blocks.*.att.key", "head"], "mode": "bone", "rank": 16}
    plan = plan_of(tmp_path, rule)
    adapted = {name for name, mine in plan.plans.items() if mine.mode == "bone"}
    assert adapted == {"head", *(f"blocks.{i}.att.key" for i in range(3))}


def test_small_parameters_train_beside_an_adapter(tmp_path):
    """RWKV-LM-RLHF's habit: norms, mixes and vectors of adapted blocks train in full."""
    rule = {"match": "blocks.*", "mode": "lora", "rank": 8}
    for version in (6, 7):
        plan = plan_of(tmp_path, rule, version=version)
        assert modes(plan, ".ln1") == {"full"} and modes(plan, "emb") == {"freeze"}
        assert modes(plan, "time_maa_k" if version == 6 else ".x_k") == {"full"}
    assert modes(plan_of(tmp_path, rule, limited_lora=True), ".ln1") == {"freeze"}
    assert modes(plan_of(tmp_path, rule | {"train_small": False}), ".ln1") == {"freeze"}


def test_the_embedding_is_not_small(tmp_path):
    """`*` with an adapter means the linear layers and their small parameters."""
    assert modes(plan_of(tmp_path, {"match": "*", "mode": "lora", "rank": 8}), "emb") == {"freeze"}


def test_alpha_is_twice_the_rank_unless_said(tmp_path):
    plan = plan_of(tmp_path, {"match": "head", "mode": "lora", "rank": 8})
    assert plan.plans["head"].alpha == 16


@pytest.mark.parametrize(
    "rule, flags, block, ends",
    [
        ({}, {}, "none", "none"),
        ({}, {"quant": True}, "nf4", "none"),
        ({}, {"quant": True, "quant_head": True}, "nf4", "nf4"),
        ({}, {"quant": True, "quant_mode": "fp6ao"}, "fp6", "none"),
        ({"quant": "int8"}, {}, "int8", "int8"),
        ({"quant": "none"}, {"quant": True, "quant_head": True}, "none", "none"),
    ],
)
def test_storage_comes_from_the_rule_or_else_the_flags(tmp_path, rule, flags, block, ends):
    rule = {"match": "*", "mode": "lora", "rank": 8, **rule}
    plan = plan_of(tmp_path, rule, **flags)
    found = [plan.plans[name].quant for name in ("emb", "blocks.0.att.key", "head")]
    assert found == [ends, block, ends]
    assert plan.plans["blocks.0.ln1"].quant == "none"


def test_a_layer_that_trains_in_full_is_never_quantized(tmp_path):
    plan = plan_of(tmp_path, {"match": "*", "mode": "full", "quant": "nf4"})
    assert {mine.quant for mine in plan.plans.values()} == {"none"}


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"match": "*", "rnak": 8}, r"rule 1: unknown key 'rnak'; did you mean 'rank'\?"),
        (
            {"match": "*", "mode": "lorra"},
            r"rule 1: mode 'lorra' is not one of full, freeze, lora, .*; did you mean 'lora'\?",
        ),
        ({"match": "block.*", "mode": "full"}, r"rule 1: 'block\.\*' matches no layer of this"),
        ({"mode": "full"}, "rule 1: 'match' is None; write a glob"),
        ({"match": "*", "mode": "lora", "rank": 8.5}, "rule 1: rank is 8.5; write a whole number"),
        ({"match": "*", "lr_init": 0}, "lr_init is 0; write more than 0; mode freeze is what"),
        ({"match": "*", "lr_init": "1e-4"}, "lr_init is '1e-4'; write a number"),
        ({"match": "*", "dropout": 1}, "dropout is 1; write a share below 1"),
        ({"match": "*", "quant": "nf3"}, r"quant 'nf3' is not one of none, .*'nf4'\?"),
        ({"match": "*", "train_small": 1}, "train_small is 1; write true or false"),
        ({"match": "emb", "mode": "lora", "rank": 8}, "mode 'lora' needs a linear layer; emb can"),
        (
            {"match": "*.key", "mode": "lora"},
            "rule 1: mode 'lora' needs a rank for blocks.0.att.key; add 'rank'",
        ),
        (
            {"match": "*.key", "mode": "bone", "rank": 48},
            r"rule 1: blocks.0.att.key: bone: rank 48 does not divide both sides of a \[64, 64\] "
            "weight; choose one that does, such as 32",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, rule, message):
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, rule)


def test_a_rule_may_be_optional(tmp_path):
    rules = ({"match": "head", "mode": "full"}, {"match": "*.gate", "mode": "full"})
    with pytest.raises(InputError, match=r"rule 2: '\*\.gate' matches no layer"):
        plan_of(tmp_path, *rules)
    plan_of(tmp_path, rules[0], rules[1] | {"optional": True})


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"rules": [\n{"match": "*",}]}', r"p\.json:2: not JSON"),
        ("[]", r"p\.json: has no rules; write"),
        ('{"rule": []}', r"p\.json: has no rules"),
        ('{"rules": [{"match": "*"}], "name": 1}', "unknown key 'name'; a profile has 'rules'"),
        ('{"rules": ["lora"]}', "rule 1: is 'lora'; write an object"),
    ],
)
def test_a_file_that_is_no_profile_is_named(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_profile(path, ["head"])


def test_a_missing_profile_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: no such file; check --layer_profile"):
        read_profile(tmp_path / "none.json", ["head"])


def filled(plan) -> RWKV:
    """A model of zeros with the plan's adapters and requires_grad."""
    model = blank().to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    for name in plan.layers:
        install(model, name, plan)
    mark_trained(model, plan)
    return model


def groups_of(tmp_path, *rules, optimizer: OptimizerFlags | None = None, **flags) -> dict:
    plan = plan_of(tmp_path, *rules, **flags)
    found = {}
    for group in parameter_groups(filled(plan), plan, optimizer or OptimizerFlags()):
        rates = (group.lr_init, group.lr_final, group.weight_decay)
        assert len(group.names) == len(group.params)
        found |= dict.fromkeys(group.names, rates)
    return found


RATES = {"lr_init": 2e-4, "lr_final": 2e-5, "weight_decay": 0.1}


def test_rates_come_from_the_profile(tmp_path):
    """w0 learns twice as fast; decay applies to matrices and adapters, not to vectors."""
    lora = {"match": "blocks.0.*", "mode": "lora", "rank": 8, **RATES}
    groups = groups_of(tmp_path, lora, {"match": "head", "mode": "full", "lr_init": 1e-3})
    assert groups["blocks.0.att.key.lora_A"] == (2e-4, 2e-5, 0.1)
    assert groups["blocks.0.att.w0"] == (4e-4, 4e-5, 0.0)
    assert groups["blocks.0.ln1.weight"] == (2e-4, 2e-5, 0.0)
    assert groups["head.weight"] == (1e-3, OptimizerFlags().lr_final, 0.0)
    assert not any("blocks.1." in name or name.startswith("emb") for name in groups)


def test_lr_advanced_0_takes_the_flags(tmp_path):
    optimizer = OptimizerFlags(lr_advanced=False, lr_init=3e-5, lr_final=3e-6, weight_decay=0.01)
    groups = groups_of(
        tmp_path, {"match": "blocks.*", "mode": "full", **RATES}, optimizer=optimizer
    )
    assert groups["blocks.0.att.key.weight"] == (3e-5, 3e-6, 0.01)
    assert groups["blocks.0.att.w0"] == (6e-5, 6e-6, 0.0)


@pytest.mark.parametrize(
    ("rules", "flags", "state", "unheard"),
    [
        ([RATES], {"lr_init": 1e-3, "weight_decay": 0.01}, False, ["lr_init", "weight_decay"]),
        ([RATES], {"lr_init": 1e-4}, False, []),  # as it is where it is not given
        ([RATES], {"lr_init": 1e-3, "lr_advanced": False}, False, []),
        ([{"lr_init": 2e-4}], {"lr_init": 1e-3, "lr_final": 1e-6}, False, ["lr_init"]),
        ([RATES, {"lr_final": 1e-5}], {"lr_init": 1e-3, "lr_final": 1e-6}, False, ["lr_final"]),
        ([RATES], {"lr_init": 1e-3, "weight_decay": 0.01}, True, ["weight_decay"]),
        ([RATES | {"state_lr_init": 0.1}], {"lr_init": 1e-3, "lr_final": 1}, True, ["lr_init"]),
    ],
)
def test_a_rate_that_the_profile_overrules_is_told(tmp_path, rules, flags, state, unheard):
    matches = ["blocks.*"] if len(rules) == 1 else ["blocks.0.*", "blocks.1.*"]
    plan = plan_of(
        tmp_path,
        *(
            {"match": match, "mode": "lora", "rank": 8, **rule}
            for match, rule in zip(matches, rules, strict=True)
        ),
    )
    lines = unheard_rates(plan, OptimizerFlags(**flags), tuned_state=state)
    assert [line.split()[0] for line in lines] == [f"--{name}" for name in unheard]
    assert all("p.json has this rate for all that trains" in line for line in lines)


def test_lora_plus_speeds_up_b(tmp_path):
    rule = {"match": "head", "mode": "lora", "rank": 8, "lr_init": 1e-4, "lr_final": 1e-5}
    groups = groups_of(tmp_path, rule, lora_plus_ratio=16.0)
    assert groups["head.lora_A"][:2] == (1e-4, 1e-5)
    assert groups["head.lora_B"][:2] == pytest.approx((16e-4, 16e-5))


def test_layerwise_lr_0_gives_all_one_rate(tmp_path):
    groups = groups_of(tmp_path, {"match": "*", "mode": "full"}, layerwise_lr=False)
    assert {rates[0] for rates in groups.values()} == {OptimizerFlags().lr_init}


def test_equal_groups_are_one(tmp_path):
    plan = plan_of(tmp_path, {"match": "blocks.*", "mode": "lora", "rank": 8, **RATES})
    groups = parameter_groups(filled(plan), plan, OptimizerFlags())
    rates = [(group.lr_init, group.lr_final, group.weight_decay) for group in groups]
    assert len(rates) == len(set(rates)) == 3
    assert {group.name for group in groups} == {"adapters", "small"}


def test_a_tuned_state_has_its_own_rates(tmp_path):
    rule = {"match": "blocks.*", "mode": "freeze", "state_lr_init": 1.0, "state_lr_final": 0.01}
    plan = plan_of(tmp_path, rule)
    model = filled(plan)
    model.blocks[0].att.time_state = torch.nn.Parameter(torch.zeros(4, 16, 16))
    (group,) = parameter_groups(model, plan, OptimizerFlags(weight_decay=0.1))
    assert group.names == ("blocks.0.att.time_state",) and group.name == "state"
    assert (group.lr_init, group.lr_final, group.weight_decay) == (1.0, 0.01, 0.0)


def test_nothing_that_trains_is_an_error(tmp_path):
    plan = plan_of(tmp_path, {"match": "*", "mode": "freeze"})
    with pytest.raises(InputError, match=r"p\.json: nothing trains; set a mode other than freeze"):
        parameter_groups(filled(plan), plan, OptimizerFlags())


def test_the_table_counts_what_the_model_has(tmp_path):
    rules = (
        {"match": "blocks.*", "mode": "lora", "rank": 8, "quant": "int8"},
        {"match": "blocks.1.ffn.*", "mode": "bone", "rank": 16},
    )
    plan = plan_of(tmp_path, *rules)
    model = filled(plan)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_count(plan) == trained
    held = stored_bytes(plan, torch.float32)
    assert held["float32"] == 4 * sum(p.numel() for p in model.parameters())
    stores = {id(m.store): m.store for m in model.modules() if getattr(m, "store", None)}
    assert held["int8"] == sum(store.bytes() for store in stores.values())
    lines = describe(plan, torch.float32)
    assert any("bone" in line and "blocks 1 ffn.key ffn.value" in line for line in lines)
    assert f"{trained:,} parameters train" in lines[-1]


def test_plans_compare_without_their_rule():
    assert LayerPlan(rule="a.json: rule 1") == LayerPlan(rule="b.json: rule 2")


LORA = {"match": "blocks.*", "mode": "lora", "rank": 4}


@pytest.mark.parametrize(
    ("rules", "flags", "wanted"),
    [
        ([LORA | {"quant": "int8"}], {}, []),
        ([LORA], {"quant": True}, []),
        (
            [LORA, {"match": "head", "mode": "full", "quant": "int8"}],
            {},
            ["p.json: rule 2: quant 'int8': has no effect, for head trains in full"],
        ),
        (
            [{"match": "*", "mode": "full"}],
            {"quant": True},
            ["--quant 1: has no effect, for every linear layer trains in full or has its storage"],
        ),
        (
            [{"match": "*", "mode": "full"}],
            {"limited_lora": True, "lora_plus_ratio": 16.0},
            [
                "--limited_lora 1: has no effect, for no layer has an adapter",
                "--lora_plus_ratio 16",
            ],
        ),
        (
            [LORA | {"mode": "bone"}],
            {"limited_lora": True, "rslora": True, "svd_niter": 0},
            ["--rslora 1: has no effect, for no layer has LoRA", "--svd_niter 0: has no effect"],
        ),
    ],
    ids=["a rule", "the flag", "a full layer", "all in full", "no adapter", "no LoRA"],
)
def test_what_has_no_effect_is_noted(tmp_path, rules, flags, wanted):
    plan = plan_of(tmp_path, *rules, **flags)
    assert len(plan.notes) == len(wanted)
    assert all(part in note for part, note in zip(wanted, plan.notes, strict=True))
    lines = describe(plan, torch.bfloat16)
    assert [line for line in lines if "has no effect" in line] == list(plan.notes)


@pytest.mark.parametrize(
    ("rules", "flags", "wanted"),
    [
        ([LORA], {"quant": True, "quant_mode": "nf4"}, []),
        (
            [LORA],
            {"quant": True, "quant_mode": "int8"},
            ["--quant 1 --quant_mode int8: has no effect on blocks.0.att.key and 1 more, which "],
        ),
        (
            [LORA | {"quant": "none"}],
            {},
            ["p.json: rule 1: quant 'none': has no effect on blocks.0.att.key and 1 more, which "],
        ),
    ],
    ids=["the same", "the flag", "a rule"],
)
def test_the_storage_of_a_quantized_file_outweighs_and_is_noted(tmp_path, rules, flags, wanted):
    flags = PeftFlags(layer_profile=write(tmp_path, *rules), **flags)
    held = {"blocks.0.att.key": "nf4", "blocks.1.att.key": "nf4"}
    notes = make_plan(blank(), flags, held).notes
    assert len(notes) == len(wanted)
    for part, note in zip(wanted, notes, strict=True):
        assert part in note and note.endswith("the model's file holds as nf4")


def test_a_rule_that_stores_norms_alone_is_refused(tmp_path):
    with pytest.raises(InputError, match="p.json: rule 2: quant 'int8' is for linear layers and e"):
        plan_of(tmp_path, LORA, {"match": "ln_out", "mode": "freeze", "quant": "int8"})
