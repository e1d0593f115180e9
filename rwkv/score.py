"""How well a model predicts a file: loss, perplexity and bits per byte, as JSON.

    python -m rwkv.score --load_model MODEL.pth --data TEXTS.jsonl

Data: .txt, one text; .jsonl, a record a line; .json, a list of records; each may be gzipped (.gz).
A record is a string, has `text`, `prompt` and `completion`, or `messages` of `role` and `content`.
Texts are scored from their first token, after the tokenizer's end of text if it has one; of
dialogues the answers are scored, written as in training (--template, --turn_end), which begins with
no end of text and closes with one.
"""

import argparse
import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv.cli import Parser, run
from rwkv.errors import InputError, not_finite
from rwkv.plain_text import decode, parse_json
from rwkv.runner import add_model_arguments, add_template_arguments, open_model

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv.model import RWKV
    from rwkv.templates import Message, Template
    from rwkv.tokenizer import Tokenizer

MAX_LOGITS = 2**25  # at once: 128 MiB in float32


class Text(NamedTuple):
    """One text to score.

    tokens: all of it.
    scored: which of the tokens count; the first never does, for nothing predicts it.
    """

    tokens: list[int]
    scored: list[bool]


class Score(NamedTuple):
    """Sums over the scored tokens of some texts.

    loss: negative log-probability, in nats.
    tokens, hits: how many there are, and for how many no other token was likelier.
    bytes: of what the tokens say, in the tokenizer's encoding.
    """

    loss: float = 0.0
    tokens: int = 0
    hits: int = 0
    bytes: int = 0

    def summary(self) -> dict[str, float | int]:
        """Means under the names that the command prints.

        Raises:
            InputError: there is no token to score.
            RunError: the loss is no finite number.
        """
        if not self.tokens:
            raise InputError("the texts have no token to score; give longer ones")
        mean = self.loss / self.tokens
        if not math.isfinite(mean):
            raise not_finite("scores")
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)),
            "bits_per_byte": self.loss / math.log(2) / self.bytes if self.bytes else math.inf,
            "token_accuracy": self.hits / self.tokens,
        }


def score_texts(
    model: "RWKV",
    texts: Sequence[Text],
    tokenizer: "Tokenizer | None" = None,
    *,
    piece: int = 4096,
) -> list[Score]:
    """The score of each text, in their order.

    Args:
        model: on any device; it is in eval mode meanwhile.
        texts: of any lengths; see rwkv.reading.read_texts.
        tokenizer: to count bytes; without it they are 0.
        piece: tokens that the model reads at once.
    """
    from rwkv.generate import evaluating
    from rwkv.reading import read_texts

    scores = [Score() for _ in texts]
    long = [n for n, text in enumerate(texts) if any(text.scored[1:])]
    with evaluating(model):
        rows = [texts[n].tokens[:-1] for n in long]
        for spans, hidden, _ in read_texts(model, rows, piece=piece):
            begin = 0
            for text, start, stop in spans:
                of_text = hidden[begin : begin + stop - start]
                begin += stop - start
                tokens, scored = texts[long[text]]
                places = [n for n in range(start, stop) if scored[n + 1]]
                targets = [tokens[n + 1] for n in places]
                if targets:
                    loss, hits = _sums(model, of_text[[n - start for n in places]], targets)
                    size = len(tokenizer.decode_bytes(targets)) if tokenizer else 0
                    part = Score(loss, len(targets), hits, size)
                    scores[long[text]] = add([scores[long[text]], part])
    return scores


def add(scores: Sequence[Score]) -> Score:
    """The score of all texts together."""
    return Score(*(sum(field) for field in zip(*scores, strict=True)))


def _sums(model: "RWKV", hidden: "Tensor", targets: list[int]) -> tuple[float, int]:
    """Loss and hits, summed over targets [n] after hidden states [n, C]."""
    import torch
    from torch.nn import functional as F

    loss, hits = 0.0, 0
    right = torch.tensor(targets, device=hidden.device)
    rows = max(1, MAX_LOGITS // model.config.vocab_size)
    with torch.no_grad():
        for h, t in zip(hidden.split(rows), right.split(rows), strict=True):
            logits = model.logits(h).float()
            loss += F.cross_entropy(logits, t, reduction="sum").double().item()
            hits += int((logits.argmax(dim=-1) == t).sum())
    return loss, hits


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file, each with where it stands.

    Raises:
        InputError: the file is missing, of an unknown kind, or not what its name says.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".txt", ".jsonl", ".json"):
        raise InputError(f"{path}: unknown kind of file; give .txt, .jsonl or .json (or their .gz)")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        zipped = path.suffix.lower() == ".gz"
        data = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    text = decode(path, data)
    if not text.strip():
        raise InputError(f"{path}: holds no text; is it the right file?")
    if kind == ".txt":
        yield str(path), text
        return
    if kind == ".jsonl":
        lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        for number, line in lines:
            yield f"{path}:{number}", parse_json(path, line, number)
        return
    records = parse_json(path, text)
    if not isinstance(records, list):
        raise InputError(f"{path}: is no list of records; write it as .jsonl, a record a line")
    for number, record in enumerate(records, start=1):
        yield f"{path}: record {number}", record


def text_of(record: Any, where: str, tokenizer: "Tokenizer", template: "Template") -> Text:
    """The tokens of a record and which of them are scored.

    Raises:
        InputError: the record has none of the known shapes, or cannot be tokenized.
    """
    from rwkv.templates import encode_dialogue

    messages = None
    if isinstance(record, dict):
        if "messages" in record:
            messages = record["messages"]
        elif "prompt" in record and "completion" in record:
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["completion"]},
            ]
        else:
            record = record.get("text")
    try:
        if messages is not None:
            return Text(*encode_dialogue(_messages(messages), template, tokenizer))
        elif isinstance(record, str):
            tokens = tokenizer.encode(record)
            scored = [True] * len(tokens)
        else:
            raise InputError(
                "has nothing to score; needs a string, 'text', 'prompt' and 'completion', or "
                "'messages'"
            )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if tokenizer.end_of_text is not None:
        return Text([tokenizer.end_of_text, *tokens], [False, *scored])
    return Text(tokens, scored)


def _messages(messages: Any) -> "list[Message]":
    from rwkv.templates import Message

    fine = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not fine:
        raise InputError(
            "'messages' is no dialogue; write a list of objects with strings 'role' and 'content'"
        )
    return [Message(m["role"], m["content"]) for m in messages]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m rwkv.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="the file to score")
    add_template_arguments(parser, "auto", "how dialogues are written (auto)")
    parser.add_argument("--limit", type=int, help="score this many records at most")
    options = parser.parse_args(argv)
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit}: needs to be at least 1; drop it to score all")

    from rwkv.templates import load_template

    records = list(read_records(options.data))[: options.limit]
    model, tokenizer = open_model(options)
    template = load_template(options.template, tokenizer, options.turn_end or None)
    texts = [text_of(record, where, tokenizer, template) for where, record in records]
    total = add([Score(), *score_texts(model, texts, tokenizer)])
    result = {"data": str(options.data), "texts": len(texts), **total.summary()}
    print(json.dumps(result))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
