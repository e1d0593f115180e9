"""Tokenize preference files into a store for --dpo, --orpo, --simpo and --kto.

    python -m data.make_pairs --input pairs.csv more.jsonl --output pairs.tok

A record has a prompt and two answers (`prompt`, `chosen`, `rejected` or `reject`, perhaps `system`;
each a string or a list of messages), two dialogues that differ in their last message (`chosen`,
`rejected`, also with `prompt`), or one answer (`prompt`, `completion`, `label`) for --kto. Files
are .jsonl, .json, .csv (each also .gz), or RWKV-LM-RLHF's .save and .h5. A record that is not as it
should be stops the command and is named; python -m data.doctor mends files.
"""

import argparse
import sys
from pathlib import Path

from rwkv.cli import Parser, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data.make_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files of records")
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder to make; must not exist"
    )
    parser.add_argument(
        "--tokenizer", default="world", help="world, bytes, bytes:ENCODING or chars:CHARACTERS"
    )
    add_template_arguments(parser)
    options = parser.parse_args(argv)

    from data.pair_records import PAIRS
    from data.records import DataError
    from data.store_cache import build_store
    from data.tokenizing import Recipe
    from rwkv.templates import load_template
    from rwkv.tokenizer import load_tokenizer

    if options.output.exists():
        raise DataError(f"{options.output}: exists; remove it or choose another --output")
    tokenizer = load_tokenizer(options.tokenizer)
    template = load_template(options.template, tokenizer, options.turn_end)
    recipe = Recipe(tokenizer.name, template)
    meta = build_store(options.output, options.input, recipe, tokenizer, kind=PAIRS)
    print(  # noqa: T201
        f"{options.output}: {meta['records']:,} records, {meta['pairs']:,} pairs, "
        f"{meta['tokens']:,} tokens"
        + "".join(f"; {count:,} {what}" for what, count in meta["notes"].items() if count)
    )
    return 0


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that decide the tokens of pairs, under the names that train.py has for them."""
    parser.add_argument(
        "--template", default="auto", help="world, g1, plain or a .json file; see data.make_sft"
    )
    parser.add_argument(
        "--turn_end",
        choices=("suffix", "eot", "both"),
        default=None,
        help="what ends an answer: the template's suffix, the end-of-text token, or both",
    )


if __name__ == "__main__":
    sys.exit(run(main))
