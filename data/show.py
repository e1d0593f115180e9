"""Print training records with the part that the loss counts marked, and their statistics.

    python -m data.show chats.jsonl --rows 3
    python -m data.show chats.tok --ctx_len 4096

On a terminal the scored part is green, elsewhere it stands between [[ and ]]. Raw files are
tokenized into the cache, where train.py finds them again under the same flags.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data.make_sft import add_encoding_arguments
from rwkv.cli import Parser, run
from rwkv.errors import InputError
from rwkv.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import numpy as np

    from data.token_store import TokenStore

TERMINAL_MARKS = ("\033[32m", "\033[0m")
PLAIN_MARKS = ("[[", "]]")
END_OF_TEXT = "<end of text>"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data.show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a file of records, or a folder of data.make_sft")
    parser.add_argument("--rows", type=int, default=5, help="records to print")
    parser.add_argument("--first", type=int, default=0, help="number of the first, from 0")
    parser.add_argument(
        "--ctx_len", type=int, default=None, help="also say how well the records fill such rows"
    )
    add_encoding_arguments(parser)
    parser.add_argument("--cache_dir", default="~/.cache/rwkv-lm-rlhf", help="see train.py")
    options = parser.parse_args(argv)
    if options.first < 0:
        raise InputError(f"--first {options.first}: records are counted from 0; give 0 or more")

    from data.store_cache import StoreSettings, open_store
    from data.token_store import is_store, open_folder

    if is_store(options.file):
        store = open_folder(options.file)
        tokenizer = load_tokenizer(store.metas[0]["tokenizer"])
    else:
        tokenizer = load_tokenizer(options.tokenizer)
        settings = StoreSettings(
            options.template, options.turn_end or "", bool(options.mask_prompt), options.cache_dir
        )
        store = open_store(options.file, settings, tokenizer)

    marks = TERMINAL_MARKS if sys.stdout.isatty() else PLAIN_MARKS
    for number in range(options.first, min(options.first + options.rows, len(store))):
        tokens, mask = store.record(number)
        head = f"record {number}: {len(tokens)} tokens, {int(mask.sum())} scored"
        print(f"--- {head}\n{marked_text(tokens, mask, tokenizer, marks)}")  # noqa: T201
    print("\n".join(statistics(store, options.ctx_len)))  # noqa: T201
    return 0


def marked_text(
    tokens: "np.ndarray", mask: "np.ndarray", tokenizer: Tokenizer, marks: tuple[str, str]
) -> str:
    """A record's text with `marks` around each stretch that is scored.

    A character whose bytes are several tokens stands where its last token does.
    """
    text, stream = "", StreamDecoder(tokenizer)
    pairs = zip(tokens.tolist(), mask.tolist(), strict=True)
    for scored, some in itertools.groupby(pairs, key=lambda pair: pair[1]):
        part = "".join(
            stream.finish() + END_OF_TEXT if token == tokenizer.end_of_text else stream.push(token)
            for token, _ in some
        )
        text += f"{marks[0]}{part}{marks[1]}" if scored else part
    return text + stream.finish()


def statistics(store: "TokenStore", ctx_len: int | None) -> list[str]:
    """Lines about a store's records and, with `ctx_len`, about the rows they would fill."""
    import numpy as np

    total, scored = int(store.lengths.sum()), int(store.scored.sum())
    low, median, high, most = np.percentile(store.lengths, [0, 50, 95, 100]).astype(int).tolist()
    lines = [
        f"--- {len(store):,} records, {int(store.dialogue.sum()):,} of them dialogues",
        f"{total:,} tokens, {scored:,} scored ({scored / total:.1%})",
        f"tokens a record: {low:,} least, {median:,} median, {high:,} at 95%, {most:,} most",
    ]
    notes = [note for meta in store.metas for note in meta["notes"].items() if note[1]]
    lines += [f"{count:,} {what}" for what, count in notes]
    if ctx_len is not None:
        from data.batch_plan import BatchPlan

        for packing in (True, False):
            plan = BatchPlan(store, ctx_len=ctx_len, packing=packing)
            how = "packed" if packing else "one record a row"
            lines.append(
                f"--ctx_len {ctx_len}, {how}: {plan.rows_per_pass:,} rows, {plan.fill:.1%} full"
            )
        report = plan.pieces.report.items()
        lines.append(", ".join(f"{what} {count:,}" for what, count in report if what != "records"))
    return lines


if __name__ == "__main__":
    sys.exit(run(main))
