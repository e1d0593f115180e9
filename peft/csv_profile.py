"""Read RWKV-LM-RLHF's CSV layer profiles, and rewrite them as JSON rules.

    python -m peft.csv_profile IN.csv OUT.json

A row stands for one block (or `emb`, `head`) and holds for all its layers. RejectParts is a list
of name fragments: a layer of the block whose name has one of them stays frozen. ln0 goes with the
embedding if that trains, else with block 0; ln_out goes with the head.
"""

import csv
import glob
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.layer_profile import LIMITS, Rule, check_limits
from rwkv.cli import Parser, run
from rwkv.errors import InputError
from rwkv.files import replacing
from rwkv.plain_text import read_text

COLUMNS = (
    *("Layer", "Mode", "Rank", "Alpha", "Dropout"),
    *("Weight_lr_init", "Weight_lr_final", "Weight_decay"),
    *("State_lr_init", "State_lr_final", "RejectParts"),
)
RATES = {"Weight_lr_init": "lr_init", "Weight_lr_final": "lr_final", "Weight_decay": "weight_decay"}
STATE_RATES = {"State_lr_init": "state_lr_init", "State_lr_final": "state_lr_final"}
LOW_RANK = {"Rank": "rank", "Alpha": "alpha", "Dropout": "dropout"}
KEYS = {  # the columns a mode reads
    "full": RATES,
    "freeze": {},
    "lora": LOW_RANK | RATES,
    "dora": LOW_RANK | RATES,
    "pissa": LOW_RANK | RATES,
    "bone": {"Rank": "rank"} | RATES,
}


@dataclass(frozen=True)
class Row:
    """One row: `where` is `FILE:LINE`, `layer` is emb, head or a block's number."""

    where: str
    layer: str
    keys: dict[str, Any]
    reject: tuple[str, ...]


def read_rows(path: Path | str, n_layer: int | None = None) -> list[Row]:
    """Read and check a CSV profile.

    Args:
        path: the file.
        n_layer: blocks of the model; None to take the file's own count.

    Raises:
        InputError: a column is missing, a value is wrong, or the rows are not emb, head and one
            of each block.
    """
    path = Path(path)
    try:
        lines = list(csv.reader(read_text(path).splitlines()))
    except csv.Error as error:
        raise InputError(f"{path}: is no CSV text ({error}); save it as UTF-8 CSV") from None
    header = [cell.strip() for cell in lines[0]] if lines else []
    missing = [name for name in COLUMNS[:-1] if name not in header]
    if missing:
        raise InputError(
            f"{path}:1: lacks the column {missing[0]}; columns are {','.join(COLUMNS)}"
        )
    rows: dict[str, Row] = {}
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}:{number}"
        if len(cells) > len(header):
            raise InputError(
                f"{where}: has {len(cells)} cells, the header {len(header)}; "
                "put a list of RejectParts in double quotes"
            )
        row = _row(where, dict(zip(header, (cell.strip() for cell in cells), strict=False)))
        if row.layer in rows:
            raise InputError(
                f"{where}: layer {row.layer} was set at {rows[row.layer].where}; remove one row"
            )
        rows[row.layer] = row
    _check_layers(path, rows, n_layer)
    return list(rows.values())


def _row(where: str, cells: dict[str, str]) -> Row:
    layer, mode = cells["Layer"], cells.get("Mode", "")
    if layer not in ("emb", "head") and not layer.isdecimal():
        raise InputError(f"{where}: Layer is {layer!r}; write emb, head or a block's number")
    if mode not in KEYS:
        raise InputError(f"{where}: Mode is {mode!r}; choose one of {', '.join(KEYS)}")
    if layer == "emb" and mode not in ("full", "freeze"):
        raise InputError(f"{where}: emb cannot be {mode!r}; choose full or freeze")
    wanted = KEYS[mode] | ({} if layer in ("emb", "head") else STATE_RATES)
    keys: dict[str, Any] = {"mode": mode}
    for column, key in wanted.items():
        keys[key] = _number(where, column, cells.get(column, ""), key)
    words = tuple(word.strip() for word in cells.get("RejectParts", "").split(","))
    reject = () if layer in ("emb", "head") else tuple(word for word in words if word)
    return Row(where, layer if layer in ("emb", "head") else str(int(layer)), keys, reject)


def _number(where: str, column: str, text: str, key: str) -> float | int:
    kind, _, _ = LIMITS[key]
    try:
        value = float(text)
        if kind is int and value != int(value):
            raise ValueError
    except (ValueError, OverflowError):
        word = "whole number" if kind is int else "number"
        raise InputError(f"{where}: {column} is {text!r}; write a {word}") from None
    check_limits(f"{where}: {column} is {text}", key, value)
    return kind(value)


def _check_layers(path: Path, rows: dict[str, Row], n_layer: int | None) -> None:
    """Stop unless there is one row for emb, head and each block."""
    for name in ("emb", "head"):
        if name not in rows:
            raise InputError(f"{path}: has no row for {name}; add one, such as {name},freeze,...")
    blocks = sorted(int(layer) for layer in rows if layer.isdecimal())
    last = blocks[-1] if blocks else -1
    count = last + 1 if n_layer is None else n_layer
    absent = sorted(set(range(count)) - set(blocks))
    if absent or not blocks:
        raise InputError(
            f"{path}: ends at layer {last}, the model has {count} blocks; add rows for "
            f"{_span(absent)}"
            if absent and absent[0] > last
            else f"{path}: has no row for layer {_span(absent)}; add it"
        )
    if last >= count:
        raise InputError(
            f"{path}: has rows up to layer {last}, the model has {count} blocks; remove rows "
            f"{_span(list(range(count, last + 1)))}, or make rules for any number of blocks with "
            "python -m peft.csv_profile"
        )


def _span(numbers: list[int]) -> str:
    """`3`, `24 to 39`, or `3, 5, 9`."""
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def rules_of(rows: list[Row]) -> list[Rule]:
    """The rules that mean what the rows mean, a rule a row."""
    rules = [
        rule for row in rows if row.layer.isdecimal() for rule in _block_rules([row.layer], row)
    ]
    return rules + _end_rules(rows)


def compact_rules_of(rows: list[Row]) -> list[Rule]:
    """As `rules_of`, with one rule for all blocks that are alike.

    Where every block is alike the rules suit models of any number of blocks.
    """
    alike: dict[Any, list[Row]] = {}
    for row in rows:
        if row.layer.isdecimal():
            alike.setdefault((tuple(row.keys.items()), row.reject), []).append(row)
    rules: list[Rule] = []
    for members in alike.values():
        layers = ["*"] if len(alike) == 1 else [row.layer for row in members]
        rules += _block_rules(layers, members[0])
    return rules + _end_rules(rows)


def _block_rules(layers: list[str], row: Row) -> list[Rule]:
    match = tuple(f"blocks.{layer}.*" for layer in layers)
    rules = [Rule(row.where, match, row.keys)]
    if row.reject:
        words = [glob.escape(word) for word in row.reject]
        rejected = tuple(f"blocks.{layer}.*{word}*" for layer in layers for word in words)
        rules.append(Rule(row.where, rejected, {"mode": "freeze"}, optional=True))
    return rules


def _end_rules(rows: list[Row]) -> list[Rule]:
    emb, head = (next(row for row in rows if row.layer == name) for name in ("emb", "head"))
    with_emb = ("emb", "blocks.0.ln0") if emb.keys["mode"] == "full" else ("emb",)
    return [
        Rule(emb.where, with_emb, emb.keys),
        Rule(head.where, ("head", "ln_out"), head.keys),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m peft.csv_profile", description="Rewrite a CSV layer profile as JSON rules."
    )
    parser.add_argument("input", type=Path, help="a .csv profile of RWKV-LM-RLHF")
    parser.add_argument("output", type=Path, help="the .json profile to write")
    options = parser.parse_args(argv)
    rows = read_rows(options.input)
    rules = [rule.as_json() for rule in compact_rules_of(rows)]
    lines = ",\n".join("  " + json.dumps(rule) for rule in rules)
    with replacing(options.output) as part:
        part.write_text(f'{{\n "rules": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(f"{options.output}: {len(rows) - 2} blocks, {len(rules)} rules")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
