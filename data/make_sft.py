r"""Tokenize files into a token store for --sft.

    python -m data.make_sft --input chats.jsonl more.csv --output chats.tok

A record is a `text`; a prompt with its answer (`prompt`, `instruction` or `question`, perhaps
`input`; `completion`, `response`, `output`, `answer` or `chosen`); or `messages`, or ShareGPT's
`conversations`. Files are .jsonl, .json, .csv (each also .gz), or RWKV-LM-RLHF's .h5.

A template of your own is a JSON file; "tool", "think" and the last two keys may be left out:

    {"system": {"prefix": "System: ", "suffix": "\n\n"},
     "user": {"prefix": "User: ", "suffix": "\n\n"},
     "assistant": {"prefix": "Assistant: ", "suffix": "\n\n"},
     "tool": {"prefix": "Tool: ", "suffix": "\n\n"},
     "think": {"prefix": "<think>\n", "suffix": "\n</think>\n"},
     "fold_blank_lines": true, "turn_end": "suffix"}

A record that is not as it should be stops the command and is named by file and line.
"""

import argparse
import sys
from pathlib import Path

from rwkv.cli import Parser, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data.make_sft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files of records")
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder to make; must not exist"
    )
    add_encoding_arguments(parser)
    parser.add_argument(
        "--workers", type=int, default=None, help="processes; the machine's processors if not given"
    )
    options = parser.parse_args(argv)

    from data.records import DataError
    from data.store_cache import build_store
    from data.tokenizing import Recipe
    from rwkv.templates import load_template
    from rwkv.tokenizer import load_tokenizer

    if options.output.exists():
        raise DataError(f"{options.output}: exists; remove it or choose another --output")
    tokenizer = load_tokenizer(options.tokenizer)
    template = load_template(options.template, tokenizer, options.turn_end)
    recipe = Recipe(tokenizer.name, template, bool(options.mask_prompt))
    meta = build_store(options.output, options.input, recipe, tokenizer, options.workers)
    print(  # noqa: T201
        f"{options.output}: {meta['records']:,} records, {meta['tokens']:,} tokens, "
        f"{meta['scored']:,} scored"
        + "".join(f"; {count:,} {what}" for what, count in meta["notes"].items() if count)
    )
    return 0


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that decide tokens and masks, under the names that train.py has for them."""
    parser.add_argument(
        "--tokenizer",
        default="world",
        help="world (the default), bytes, bytes:ENCODING or chars:CHARACTERS",
    )
    parser.add_argument(
        "--template",
        default="auto",
        help="world, g1, plain or a .json file; auto is plain for chars:, else world",
    )
    parser.add_argument(
        "--turn_end",
        choices=("suffix", "eot", "both"),
        default=None,
        help="what ends an answer: the template's suffix, the end-of-text token, or both",
    )
    parser.add_argument(
        "--mask_prompt",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: the loss counts answers only; 0: prompts too",
    )


if __name__ == "__main__":
    sys.exit(run(main))
