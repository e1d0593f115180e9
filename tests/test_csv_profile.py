"""RWKV-LM-RLHF's CSV profiles: its semantics, its own files, and their JSON twins."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from peft.csv_profile import main, read_rows
from peft.flags import PeftFlags
from peft.plan import Plan, make_plan
from rwkv.config import LowRanks, RWKVConfig
from rwkv.errors import InputError
from rwkv.model import RWKV

HEADER = (
    "Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,"
    "State_lr_init,State_lr_final,RejectParts\n"
)
FROZEN = "emb,freeze,0,0,0,1e-5,1e-6,0,0.05,0.01,\n"
HEAD = "head,freeze,0,0,0,1e-5,1e-6,0,0.05,0.01,\n"
LORA = "{},lora,16,32,0.01,1e-4,1e-5,0.1,0.05,0.01,{}\n"
UPSTREAM_WIDTH = 1024  # every rank in its files divides this


@cache
def model(n_layer: int, C: int) -> RWKV:
    config = RWKVConfig(
        version=7,
        n_layer=n_layer,
        n_embd=C,
        dim_ffn=4 * C,
        vocab_size=16 * C,
        head_size=16,
        ranks=LowRanks(8, 8, 8, 8, 8),
    )
    with torch.device("meta"):
        return RWKV(config, "reference")


def write(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "p.csv"
    path.write_text(HEADER + "".join(rows))
    return path


def plan_of(path: Path, n_layer: int, **flags) -> Plan:
    C = flags.pop("C", 64)
    flags = PeftFlags(layer_profile=str(path), **flags)
    return make_plan(model(n_layer, C), flags)


def test_a_row_speaks_for_its_block(tmp_path):
    plans = plan_of(write(tmp_path, FROZEN, LORA.format(0, ""), HEAD), 1).plans
    key = plans["blocks.0.att.key"]
    assert (key.mode, key.rank, key.alpha, key.dropout) == ("lora", 16, 32, 0.01)
    assert (key.lr_init, key.lr_final, key.weight_decay) == (1e-4, 1e-5, 0.1)
    state = plans["blocks.0.att.time_state"]
    assert (state.state_lr_init, state.state_lr_final) == (0.05, 0.01)
    assert {plans[name].mode for name in ("emb", "head", "ln_out")} == {"freeze"}
    assert {plans[f"blocks.0.{name}"].mode for name in ("ln0", "ln1", "att.x_k")} == {"full"}


def test_ln0_goes_with_an_embedding_that_trains(tmp_path):
    emb = "emb,full,0,0,0,7e-6,7e-7,0.2,0.05,0.01,\n"
    plans = plan_of(write(tmp_path, emb, LORA.format(0, ""), HEAD), 1).plans
    assert plans["blocks.0.ln0"].lr_init == plans["emb"].lr_init == 7e-6
    assert plans["blocks.0.ln1"].lr_init == 1e-4


def test_ln_out_goes_with_the_head(tmp_path):
    head = "head,lora,8,16,0,3e-5,3e-6,0,0.05,0.01,\n"
    path = write(tmp_path, FROZEN, LORA.format(0, ""), head)
    plans = plan_of(path, 1).plans
    assert (plans["head"].mode, plans["ln_out"].mode) == ("lora", "full")
    assert plans["ln_out"].lr_init == 3e-5
    assert plan_of(path, 1, limited_lora=True).plans["ln_out"].mode == "freeze"


def test_reject_parts_freeze_by_name_fragment(tmp_path):
    path = write(tmp_path, FROZEN, LORA.format(0, '"att.k,ln,ffn.gate"'), HEAD)
    plans = plan_of(path, 1).plans
    frozen = {name for name, mine in plans.items() if mine.mode == "freeze"}
    assert {"blocks.0.att.key", "blocks.0.att.k_k", "blocks.0.ln1", "blocks.0.att.ln_x"} <= frozen
    assert plans["blocks.0.ffn.key"].mode == "lora" and plans["blocks.0.att.x_k"].mode == "full"


def test_a_rejected_layer_is_stored_as_the_flags_say(tmp_path):
    path = write(tmp_path, FROZEN, LORA.format(0, "ffn.key"), HEAD)
    plans = plan_of(path, 1, quant=True, quant_mode="int8").plans
    assert plans["blocks.0.ffn.key"].quant == "int8"


def test_a_byte_order_mark_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "p.csv"
    text = HEADER + FROZEN + "\n" + LORA.format(0, "") + ",,,,,,,,,,\n" + HEAD
    path.write_text(text.replace("\n", "\r\n"), encoding="utf-8-sig")
    assert [row.layer for row in read_rows(path)] == ["emb", "0", "head"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([FROZEN, HEAD], r"p\.csv: ends at layer -1, the model has 2 blocks; add rows for 0 to 1"),
        (
            [FROZEN, LORA.format(0, ""), HEAD],
            r"p\.csv: ends at layer 0, the model has 2 blocks; add rows for 1$",
        ),
        ([FROZEN, LORA.format(1, ""), HEAD], r"p\.csv: has no row for layer 0; add it"),
        (
            [FROZEN, *(LORA.format(n, "") for n in range(4)), HEAD],
            "has rows up to layer 3, the model has 2 blocks; remove rows 2 to 3",
        ),
        (
            [FROZEN, LORA.format(0, ""), LORA.format(0, ""), HEAD],
            r"p\.csv:4: layer 0 was set at .*p\.csv:3; remove one row",
        ),
        ([LORA.format(0, ""), LORA.format(1, ""), HEAD], "has no row for emb; add one"),
        ([FROZEN.replace("emb", "end")], r"p\.csv:2: Layer is 'end'; write emb, head or a block"),
        ([FROZEN.replace("freeze", "frozen")], r"p\.csv:2: Mode is 'frozen'; choose one of full"),
        ([FROZEN.replace("freeze", "lora")], r"p\.csv:2: emb cannot be 'lora'; choose full or f"),
        ([LORA.format(0, "").replace("16", "x")], r"p\.csv:2: Rank is 'x'; write a whole number"),
        ([LORA.format(0, "").replace("1e-4", "0")], "Weight_lr_init is 0; write more than 0"),
        ([LORA.format(0, "").replace("1e-4", "inf")], "Weight_lr_init is inf; write a finite"),
        ([LORA.format(0, "").replace("0.01", "1", 1)], "Dropout is 1; write a share below 1"),
        ([LORA.format(0, "att.key,att.value")], "has 12 cells, the header 11; put a list of Reje"),
        (
            [FROZEN, LORA.format(0, "").replace("16", "999"), LORA.format(1, ""), HEAD],
            r"p\.csv:3: blocks.0.att.receptance: lora: rank 999 is outside 1 to 64",
        ),
    ],
)
def test_mistakes_are_named_by_line(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        plan_of(write(tmp_path, *rows), 2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"p\.csv:1: lacks the column Layer"),
        ("Layer,Mode,Rank\n", r"p\.csv:1: lacks the column Alpha; columns are Layer,Mode,Rank,"),
    ],
)
def test_missing_columns_are_named(tmp_path, text, message):
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(path)


BROKEN = {"40_TEST_full": 40, "48_TEST_full": 48}


def upstream_files(assets: Path) -> list[Path]:
    found = sorted((assets / "upstream" / "layerprofile").glob("*.csv"))
    assert len(found) > 50
    return found


def layers_in_name(path: Path) -> int:
    return int(re.match(r"\d+", path.stem).group())


def test_upstream_profiles_load_and_their_json_twins_mean_the_same(assets, tmp_path):
    """All files that RWKV-LM-RLHF ships but its two broken ones, for models of their depth."""
    for path in upstream_files(assets):
        if path.stem in BROKEN:
            continue
        n_layer, twin = layers_in_name(path), tmp_path / f"{path.stem}.json"
        from_csv = plan_of(path, n_layer, C=UPSTREAM_WIDTH)
        assert len(from_csv.plans) == len(from_csv.layers)
        assert main([str(path), str(twin)]) == 0
        assert plan_of(twin, n_layer, C=UPSTREAM_WIDTH).plans == from_csv.plans, path.name


def test_upstream_profiles_that_stop_early_are_named(assets):
    for name, n_layer in BROKEN.items():
        path = assets / "upstream" / "layerprofile" / f"{name}.csv"
        wanted = f"ends at layer 23, the model has {n_layer} blocks; add rows for 24 to"
        with pytest.raises(InputError, match=wanted):
            plan_of(path, n_layer, C=UPSTREAM_WIDTH)


def test_alike_rows_become_one_rule_for_any_depth(tmp_path):
    path = write(tmp_path, FROZEN, *(LORA.format(n, "att.key") for n in range(3)), HEAD)
    twin = tmp_path / "p.json"
    main([str(path), str(twin)])
    plan = plan_of(twin, 5)
    assert {plan.plans[f"blocks.{n}.ffn.key"].mode for n in range(5)} == {"lora"}
    assert {plan.plans[f"blocks.{n}.att.key"].mode for n in range(5)} == {"freeze"}
