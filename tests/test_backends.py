"""Which backend runs: order, refusals, and what is said about them."""

import sys
from types import ModuleType

import pytest
import torch

from rwkv.ops.backends import choice_for, choose_backend, describe_choice

SAMPLE = torch.zeros(1, 32, 2, 16)


@pytest.fixture
def table(monkeypatch):
    """Backends: one that is not there, one that refuses packing, one slow for T < 64, one more."""

    def module(**functions):
        backend = ModuleType("backend")
        backend.why_not = lambda sample, packed: None
        for name, function in functions.items():
            setattr(backend, name, function)
        return backend

    made = {
        "picky": module(why_not=lambda sample, packed: "packs nothing" if packed else None),
        "large": module(
            why_slow=lambda sample, packed: "is for 64 tokens" if sample.shape[1] < 64 else None
        ),
        "plain": module(),
    }
    table = {"absent": f"{__name__}_absent"}
    for name, backend in made.items():
        table[name] = f"{__name__}_{name}"
        monkeypatch.setitem(sys.modules, table[name], backend)
    return table


def test_auto_takes_the_first_that_can(table):
    choice = choose_backend("op", table, "auto", SAMPLE, packed=False)
    assert choice.name == "picky"
    assert list(choice.passed_over) == ["absent"]
    assert "cannot be imported (No module named" in choice.passed_over["absent"]


def test_auto_passes_over_what_is_slow_here(table):
    choice = choose_backend("op", table, "auto", SAMPLE, packed=True)
    assert choice.name == "plain"
    assert choice.passed_over["large"] == "is for 64 tokens"
    longer = SAMPLE.expand(1, 32, 2, 16).repeat(1, 2, 1, 1)
    assert choose_backend("op", table, "auto", longer, packed=True).name == "large"


def test_slow_is_better_than_nothing(table):
    del table["plain"]
    assert choose_backend("op", table, "auto", SAMPLE, packed=True).name == "large"


def test_a_named_backend_runs_though_it_is_slow(table):
    assert choose_backend("op", table, "large", SAMPLE, packed=True).name == "large"


def test_a_refusal_gives_the_reason(table):
    wanted = r"op: --kernel picky cannot run here \(picky: packs nothing\); use --kernel auto"
    with pytest.raises(RuntimeError, match=wanted):
        choose_backend("op", table, "picky", SAMPLE, packed=True)


def test_all_refusals_are_listed(table):
    del table["plain"], table["large"]
    with pytest.raises(RuntimeError, match="--kernel auto cannot.*absent: cannot be.*picky: packs"):
        choose_backend("op", table, "auto", SAMPLE, packed=True)


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
def test_the_choice_is_described(op):
    text = describe_choice(op, choice_for(op, (1, 512, 12, 64), device="cpu", dtype=torch.float32))
    assert text.startswith(f"{op}: torch (")
    assert "fla: needs a GPU, the tensors are on cpu" in text


def test_few_tokens_go_step_by_step():
    text = describe_choice(
        "wkv7", choice_for("wkv7", (1, 1, 12, 64), device="cpu", dtype=torch.float32)
    )
    assert text.startswith("wkv7: reference (")
    assert "torch: 1 tokens are fewer than a chunk is worth" in text
