"""Preference records in their spellings, brought to a prompt and two answers.

prompt, chosen, rejected (or reject), perhaps system     strings, or lists of messages
messages or conversations, chosen, rejected              the prompt as a dialogue
chosen, rejected                                         two dialogues that differ in their last
                                                         message; perhaps with their beginning as
                                                         prompt, which then comes once
prompt, completion (or response), label                  one answer, good or bad

A prompt that ends with an answer is a dialogue whose question was answered: that answer is not of
the prompt.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from data.conversations import join_turns, parse_messages, same_turns
from data.pair_store import EncodedPairs, PairStore, write_pairs
from data.progress import Progress
from data.records import DataError, RecordFile, parse_json
from data.store_cache import H5_SUFFIXES, StoreKind
from data.tokenizing import Recipe, encode_record
from data.upstream_pairs import SAVE_SUFFIX, TokenPair, read_pairs_h5, read_save
from rwkv.errors import InputError
from rwkv.templates import Message
from rwkv.tokenizer import Tokenizer

REJECTED = ("rejected", "reject")
DIALOGUES = ("messages", "conversations")
ANSWERS = ("completion", "response", "answer", "output")
LABELS = {"1": True, "true": True, "0": False, "false": False}
MEND = "python -m data.doctor FILE --fix OUT leaves such records out"
NEEDS = "needs prompt, chosen and rejected (or reject), or prompt, completion and label"
EQUAL = "left out, chosen and rejected are equal"
RECORDS_A_CHUNK = 512


@dataclass(frozen=True)
class TextPair:
    """A dialogue up to the answer, and its answers as messages; an answer may be missing.

    weight: the record's own `weight`, which nothing here reads: for files made of the record.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    weight: Any = None

    def context(self) -> list[Message]:
        """The prompt as pairs are trained on: none of it is scored."""
        return [replace(message, scored=False) for message in self.prompt]


class Located(NamedTuple):
    """A record and where it stands: its line, or its number in files without lines."""

    line: int
    pair: TextPair


def read_text_pairs(
    path: Path,
    progress: Progress | None = None,
    parse: Callable[[Any, str], "TextPair"] | None = None,
) -> Iterator[Located]:
    """Yield the records of a .jsonl, .json or .csv file.

    Args:
        path: the file.
        progress: called now and then.
        parse: from a record and where it stands to its texts; None for parse_pair.

    Raises:
        DataError: names path and line: a column is missing, an answer is empty, or a value has
            another type.
    """
    file = RecordFile(path)
    for number, raw in enumerate(file, start=1):
        where = f"{path}:{raw.line}"
        yield Located(raw.line, (parse or parse_pair)(parse_json(path, raw), where))
        if progress is not None and number % RECORDS_A_CHUNK == 0:
            progress(file.position(), file.size, number)


def parse_pair(record: Any, where: str) -> TextPair:
    """The prompt and answers of one parsed record.

    Raises:
        DataError: as in read_text_pairs.
    """
    if not isinstance(record, dict):
        _stop(where, "is no object", NEEDS)
    record = {key: value for key, value in record.items() if value is not None}
    system = []
    if record.get("system"):
        system = [Message("system", _text(record["system"], where, "system"))]
    rejected_key = next((key for key in REJECTED if key in record), None)
    if "chosen" in record and rejected_key:
        prompt = _prompt(record, where)
        chosen = _answered(prompt, record, "chosen", where)
        rejected = _answered(prompt, record, rejected_key, where)
        if not same_turns(chosen[:-1], rejected[:-1]):
            _stop(where, f"'chosen' and {rejected_key!r} differ before their last message")
        pair = TextPair(join_turns(system, chosen[:-1], where), chosen[-1:], rejected[-1:])
    else:
        pair = _labelled(record, system, where)
    return replace(pair, weight=record.get("weight"))


def parse_prompt(record: Any, where: str) -> TextPair:
    """The prompt and good answer of one parsed record; a rejected answer is not looked at.

    The good answer is `chosen`, or a `completion` (or `response`, `answer`, `output`).

    Raises:
        DataError: as in read_text_pairs.
    """
    key = None
    if isinstance(record, dict):
        key = next((k for k in ("chosen", *ANSWERS) if record.get(k) is not None), None)
    if key is None:
        _stop(where, "has no good answer", "needs prompt and chosen (or completion)")
    rest = {k: v for k, v in record.items() if k not in (*REJECTED, *ANSWERS, "label")}
    answer = record[key]
    return replace(parse_pair({**rest, "chosen": answer, "rejected": answer}, where), rejected=[])


def parse_question(record: Any, where: str) -> TextPair:
    """The prompt of one parsed record; answers are looked at only where they are dialogues.

    Raises:
        DataError: as in read_text_pairs.
    """
    if not isinstance(record, dict):
        _stop(where, "has no prompt")
    chosen: Any = record.get("chosen")
    rejected = next((record[key] for key in REJECTED if record.get(key)), chosen)
    if not isinstance(chosen, list) or len(chosen) < 2:
        if not any(record.get(key) for key in ("prompt", "question", *DIALOGUES)):
            _stop(where, "has no prompt")
        chosen = rejected = "-"
    rest = {k: v for k, v in record.items() if k not in (*REJECTED, *ANSWERS, "label")}
    pair = parse_pair({**rest, "chosen": chosen, "rejected": rejected}, where)
    return replace(pair, chosen=[], rejected=[])


def _prompt(record: dict[str, Any], where: str) -> list[Message]:
    key = next((key for key in ("prompt", "question", *DIALOGUES) if key in record), None)
    turns = [] if key is None else _turns(record[key], "user", where, key)
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def _answered(prompt: list[Message], record: dict[str, Any], key: str, where: str) -> list[Message]:
    """The prompt and the answer under `key`, which may repeat the prompt, as one dialogue."""
    turns = _turns(record[key], "assistant", where, key)
    found = join_turns(prompt, turns, f"{where}: {key!r}")
    if found[-1].role != "assistant":
        _stop(where, f"{key!r} does not end with a message of the assistant")
    if len(found) < 2:
        _stop(where, "has no prompt")
    return found


def _labelled(record: dict[str, Any], system: list[Message], where: str) -> TextPair:
    key = next((key for key in ANSWERS if key in record), None)
    if key is None or "label" not in record or not (prompt := _prompt(record, where)):
        _stop(where, f"has {', '.join(map(repr, record)) or 'nothing'}", NEEDS)
    label = LABELS.get(str(record["label"]).lower())
    if label is None:
        _stop(where, f"'label' is {record['label']!r}, neither true nor false")
    found = _answered(prompt, record, key, where)
    prompt, answer = join_turns(system, found[:-1], where), found[-1:]
    return TextPair(prompt, answer if label else [], [] if label else answer)


def _turns(value: Any, role: str, where: str, name: str) -> list[Message]:
    if isinstance(value, (list, dict)):
        return parse_messages(value, f"{where}: {name!r}")
    return [Message(role, _text(value, where, name))]


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        _stop(where, f"{name!r} is {value!r}, not a string")
    if not value.strip():
        _stop(where, f"{name!r} is empty")
    return value


def _stop(where: str, what: str, mend: str = MEND) -> NoReturn:
    raise DataError(f"{where}: {what}; {mend}")


def encode_pair(
    pair: TextPair, recipe: Recipe, tokenizer: Tokenizer
) -> tuple[list[int], list[int], list[int]]:
    """Tokens of the prompt and of each answer with what ends it; [] for a missing answer.

    Raises:
        InputError: the template lacks a role, or the prompt gives no token.
    """
    prompt: list[int] = []
    sides = []
    for side in (pair.chosen, pair.rejected):
        tokens, mask = encode_record(pair.context() + side, recipe, tokenizer) if side else ([], [])
        begin = mask.index(True) if any(mask) else len(tokens)
        prompt = tokens[:begin] or prompt
        sides.append(tokens[begin:])
    if not prompt or not any(sides):
        raise InputError("the prompt or its answers give no token; remove the record")
    return prompt, sides[0], sides[1]


def encode_pairs(
    path: Path, recipe: Recipe, tokenizer: Tokenizer, workers: int | None = None
) -> Iterator[EncodedPairs]:
    """Yield the encoded records of a file of any kind; equal answers are left out and counted.

    Args:
        path: .jsonl, .json or .csv (each also .gz), .save or .h5 of RWKV-LM-RLHF.
        recipe: how texts are encoded.
        tokenizer: the recipe's.
        workers: has no effect; records are encoded in this process.
    """
    progress = Progress(f"tokenizing {path.name}")
    try:
        chunk: list[tuple[Sequence[int], Sequence[int], Sequence[int]]] = []
        notes = Counter[str]()
        for where, triple in _token_triples(path, recipe, tokenizer, progress):
            if list(triple[1]) == list(triple[2]):
                notes[EQUAL] += 1
                continue
            if not len(triple[0]) or not (len(triple[1]) or len(triple[2])):
                raise DataError(f"{where}: has an empty prompt or no answer; {MEND}")
            chunk.append(triple)
            if len(chunk) == RECORDS_A_CHUNK:
                yield _encoded(chunk, notes)
                chunk, notes = [], Counter()
        yield _encoded(chunk, notes)
    finally:
        progress.finish()


def _token_triples(
    path: Path, recipe: Recipe, tokenizer: Tokenizer, progress: Progress
) -> Iterator[tuple[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]]:
    found: Iterator[TokenPair] | None = None
    if path.suffix.lower() == SAVE_SUFFIX:
        found = read_save(path, tokenizer)
    elif path.suffix.lower() in H5_SUFFIXES:
        found = read_pairs_h5(path, tokenizer)
    if found is not None:
        for number, pair in enumerate(found):
            if not pair.chosen or not pair.rejected:
                raise DataError(f"{path}: record {number}: an answer is empty; {MEND}")
            yield f"{path}: record {number}", (pair.prompt, pair.chosen, pair.rejected)
        return
    for line, text in read_text_pairs(path, progress):
        try:
            yield f"{path}:{line}", encode_pair(text, recipe, tokenizer)
        except DataError:
            raise
        except InputError as error:
            raise DataError(f"{path}:{line}: {error}") from None


def _encoded(
    chunk: list[tuple[Sequence[int], Sequence[int], Sequence[int]]], notes: Counter[str]
) -> EncodedPairs:
    parts = [np.asarray(part, dtype=np.uint16) for triple in chunk for part in triple]
    lengths = [[len(part) for part in triple] for triple in chunk]
    return EncodedPairs(
        np.concatenate(parts) if parts else np.empty(0, np.uint16),
        np.array(lengths, dtype=np.int64).reshape(-1, 3),
        notes,
    )


PAIRS = StoreKind((SAVE_SUFFIX, *H5_SUFFIXES), False, encode_pairs, write_pairs, PairStore)
