"""Layer profiles: which layers train, how, and at what learning rate.

A profile is a JSON file of rules. A rule names layers with `match`, a glob or a list of globs, and
sets some of RULE_KEYS for them; where two rules set the same key, the later one holds. A rule with
`"optional": true` may match nothing. A CSV profile of RWKV-LM-RLHF is turned into rules first
(peft/csv_profile.py).

The layers of a model are its linear layers (`blocks.0.att.key`), norms (`blocks.0.ln1`), the
embedding (`emb`) and every other parameter by itself (`blocks.0.att.x_k`).
"""

import difflib
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peft.flags import QUANT_ALIASES, QUANT_MODES
from rwkv.errors import InputError
from rwkv.plain_text import parse_json, read_text

ADAPTER_MODES = ("lora", "dora", "dora_column", "bone", "miss", "pissa")
MODES = ("full", "freeze", *ADAPTER_MODES)
STORAGES = ("none", *QUANT_MODES, *QUANT_ALIASES)


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    mode: full, freeze, or an adapter over the frozen weight of a linear layer. Norms and other
        small parameters under an adapter's rule train in full if `train_small`; the embedding
        trains under `full` only.
    rank, alpha, dropout: of the adapter; alpha None for twice the rank. Bone and MiSS have
        neither alpha nor dropout.
    quant: storage of a frozen weight; "none" for as it is, None for what the flags say.
    lr_init, lr_final, weight_decay: None for what the flags say.
    state_lr_init, state_lr_final: rates of the layer's tuned state, where there is one.
    rule: the file and rule that chose the mode, for messages.
    """

    mode: str = "freeze"
    rank: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    quant: str | None = None
    lr_init: float | None = None
    lr_final: float | None = None
    weight_decay: float | None = None
    state_lr_init: float | None = None
    state_lr_final: float | None = None
    train_small: bool = True
    rule: str = field(default="", compare=False)

    def in_words(self) -> str:
        """What is done, without the rule that says so: `mode lora, rank 16, ...`."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)


RULE_KEYS = tuple(f.name for f in fields(LayerPlan) if f.name != "rule")
LIMITS = {  # the type of a key's value and a bound: (type, lowest, whether the lowest is allowed)
    "rank": (int, 1, True),
    "alpha": (float, 0, False),
    "dropout": (float, 0, True),
    "lr_init": (float, 0, False),
    "lr_final": (float, 0, True),
    "weight_decay": (float, 0, True),
    "state_lr_init": (float, 0, False),
    "state_lr_final": (float, 0, True),
}


@dataclass(frozen=True)
class Rule:
    """One rule: where it stands (`lora.json: rule 2`), which layers, and the keys it sets."""

    where: str
    match: tuple[str, ...]
    changes: dict[str, Any]
    optional: bool = False

    def hits(self, layer_names: Sequence[str]) -> set[str]:
        """The layers that it names."""
        return {name for glob in self.match for name in fnmatch.filter(layer_names, glob)}

    def as_json(self) -> dict[str, Any]:
        match = self.match[0] if len(self.match) == 1 else list(self.match)
        return {"match": match, **self.changes} | ({"optional": True} if self.optional else {})


def read_profile(path: Path | str, layer_names: Sequence[str]) -> list[Rule]:
    """The rules of a profile, for `plans_of`.

    Args:
        path: a JSON profile, or a CSV one by its ending.
        layer_names: of the model, such as "blocks.0.att.key".

    Raises:
        InputError: the file is no profile, or has an unknown key, mode or value. The message names
            the file, the rule and the mend.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; check --layer_profile")
    if path.suffix.lower() == ".csv":
        from peft.csv_profile import read_rows, rules_of

        blocks = {name.split(".")[1] for name in layer_names if name.startswith("blocks.")}
        return rules_of(read_rows(path, n_layer=len(blocks)))
    return read_rules(path)


def read_rules(path: Path) -> list[Rule]:
    """The rules of a JSON profile, each checked by itself."""
    content = parse_json(path, read_text(path), once=True)
    rules = content.get("rules") if isinstance(content, dict) else None
    if not isinstance(rules, list) or not rules:
        raise InputError(f'{path}: has no rules; write {{"rules": [{{"match": "blocks.*", ...}}]}}')
    for key in content:
        if key not in ("rules", "about"):
            raise InputError(f"{path}: unknown key {key!r}; a profile has 'rules' and 'about'")
    return [_rule(f"{path}: rule {n}", rule) for n, rule in enumerate(rules, start=1)]


def _rule(where: str, rule: object) -> Rule:
    if not isinstance(rule, dict):
        raise InputError(f"{where}: is {rule!r}; write an object with 'match' and keys to set")
    changes = dict(rule)
    for key in changes:
        if key not in (*RULE_KEYS, "match", "optional"):
            near = difflib.get_close_matches(key, (*RULE_KEYS, "match", "optional"), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(RULE_KEYS)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
    match, optional = changes.pop("match", None), changes.pop("optional", False)
    globs = [match] if isinstance(match, str) else match
    if not isinstance(globs, list) or not globs or not all(isinstance(g, str) for g in globs):
        raise InputError(
            f"{where}: 'match' is {match!r}; write a glob such as \"blocks.*.att.key\""
        )
    if not isinstance(optional, bool):
        raise InputError(f"{where}: 'optional' is {optional!r}; write true or false")
    return Rule(where, tuple(globs), {k: _value(where, k, v) for k, v in changes.items()}, optional)


def _value(where: str, key: str, value: Any) -> Any:
    """The value of a rule's key, checked."""
    if key == "mode" or key == "quant":
        words = MODES if key == "mode" else STORAGES
        if value not in words:
            near = difflib.get_close_matches(str(value), words, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
            raise InputError(f"{where}: {key} {value!r} is not one of {', '.join(words)}; {hint}")
        return QUANT_ALIASES.get(value, value)
    if key == "train_small":
        if not isinstance(value, bool):
            raise InputError(f"{where}: train_small is {value!r}; write true or false")
        return value
    kind, _, _ = LIMITS[key]
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        word = "a whole number" if kind is int else "a number"
        raise InputError(f"{where}: {key} is {value!r}; write {word}")
    check_limits(f"{where}: {key} is {value}", key, value)
    return value if kind is int else float(value)


def check_limits(said: str, key: str, value: float) -> None:
    """Stop at a number that a key cannot have; `said` begins the message."""
    _, lowest, allowed = LIMITS[key]
    if not math.isfinite(value):
        raise InputError(f"{said}; write a finite number")
    if value < lowest or (value == lowest and not allowed):
        bound = f"{lowest} or more" if allowed else f"more than {lowest}"
        hint = "; mode freeze is what keeps a layer from training" if "lr_init" in key else ""
        raise InputError(f"{said}; write {bound}{hint}")
    if key == "dropout" and value >= 1:
        raise InputError(f"{said}; write a share below 1")


def plans_of(rules: Sequence[Rule], layer_names: Sequence[str]) -> dict[str, LayerPlan]:
    """Apply rules in order.

    Raises:
        InputError: a rule matches no layer, or asks for an adapter on the embedding alone.
    """
    plans = dict.fromkeys(layer_names, LayerPlan())
    for rule in rules:
        hit = rule.hits(layer_names)
        if not hit and not rule.optional:
            raise InputError(
                f"{rule.where}: {', '.join(map(repr, rule.match))} matches no layer of this model, "
                f"whose layers are {layer_names[0]} to {layer_names[-1]}; mend the pattern"
            )
        if hit == {"emb"} and rule.changes.get("mode") in ADAPTER_MODES:
            raise InputError(
                f"{rule.where}: mode {rule.changes['mode']!r} needs a linear layer; "
                "emb can be full or freeze"
            )
        changes = dict(rule.changes, rule=rule.where) if "mode" in rule.changes else rule.changes
        for name in hit:
            plans[name] = replace(plans[name], **changes)
    return plans
