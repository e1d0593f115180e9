"""Records to tokens and masks, in as many processes as the work is worth.

Chunks of records go to worker processes in turn and come back in the file's order, so the result
does not depend on their number.
"""

import multiprocessing
import os
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.conversations import read_conversations
from data.records import DataError, RawRecord, RecordFile, parse_json
from rwkv.errors import InputError, RunError
from rwkv.templates import Message, Template, encode_dialogue
from rwkv.tokenizer import Tokenizer, load_tokenizer

CHUNK_BYTES = 1 << 20
SMALL_FILE = 16 << 20  # bytes below which starting processes takes longer than the work


@dataclass(frozen=True)
class Recipe:
    """All that decides which tokens and which mask a record gets.

    tokenizer: its name.
    template: how dialogues are written.
    mask_prompt: whether the loss counts the assistant's part of dialogues only.
    """

    tokenizer: str
    template: Template
    mask_prompt: bool = True


class Encoded(NamedTuple):
    """Records one after another.

    tokens: uint16, all records end to end.
    mask: bool, for each token whether it is scored as a target; false for a record's first.
    lengths: int64, tokens of each record.
    dialogue: bool, for each record whether it has turns; false for plain text.
    notes: what was left out or added, counted under words for the user.
    """

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    dialogue: np.ndarray
    notes: Counter[str]


def encode_file(
    path: Path, recipe: Recipe, workers: int, progress: Callable[[int, int, int], None]
) -> Iterator[Encoded]:
    """Yield the encoded records of a .jsonl, .json or .csv file in order.

    Args:
        path: the file.
        recipe: how to encode.
        workers: processes at most; small files are encoded in this one.
        progress: called now and then with bytes read, bytes in all, and records so far.

    Raises:
        DataError: a record is not as it should be; names path and line.
    """
    file = RecordFile(path)
    processes = 1 if file.size < SMALL_FILE else max(1, workers)
    records = 0
    with _encoders(processes, path, recipe) as encode:
        for encoded in encode(_chunks(file)):
            records += len(encoded.lengths)
            progress(file.position(), file.size, records)
            yield encoded


def encode_record(
    conversation: str | list[Message], recipe: Recipe, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Tokens of a text or dialogue, its end of text included, and the mask over them."""
    if isinstance(conversation, str):
        tokens = tokenizer.encode(conversation)
        tokens += [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        mask = [True] * len(tokens)
    else:
        tokens, mask = encode_dialogue(conversation, recipe.template, tokenizer)
    if not recipe.mask_prompt:
        mask = [True] * len(tokens)
    mask[:1] = [False] * len(mask[:1])
    return tokens, mask


def encode_chunk(
    path: Path, chunk: list[RawRecord], recipe: Recipe, tokenizer: Tokenizer
) -> Encoded:
    """Encode some records of a file."""
    tokens: list[int] = []
    mask: list[bool] = []
    lengths, dialogue, notes = [], [], Counter[str]()
    for raw in chunk:
        where = f"{path}:{raw.line}"
        for conversation in read_conversations(parse_json(path, raw), where):
            try:
                found, scored = encode_record(conversation, recipe, tokenizer)
            except InputError as error:
                raise DataError(f"{where}: {error}") from None
            if not found:
                raise DataError(f"{where}: gives no token; remove the record")
            tokens += found
            mask += scored
            lengths.append(len(found))
            dialogue.append(not isinstance(conversation, str))
            if recipe.template.think is None and not isinstance(conversation, str):
                thoughts = sum(bool(message.thought.strip()) for message in conversation)
                if thoughts:
                    notes["thoughts left out (the template has no marks for them)"] += thoughts
    return Encoded(
        np.array(tokens, dtype=np.uint16),
        np.array(mask, dtype=np.bool_),
        np.array(lengths, dtype=np.int64),
        np.array(dialogue, dtype=np.bool_),
        notes,
    )


def processor_count() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(file: RecordFile) -> Iterator[list[RawRecord]]:
    chunk: list[RawRecord] = []
    size = 0
    for raw in file:
        chunk.append(raw)
        size += raw.size
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


Encoder = Callable[[Iterable[list[RawRecord]]], Iterator[Encoded]]


@contextmanager
def _encoders(processes: int, path: Path, recipe: Recipe) -> Iterator[Encoder]:
    """A function that encodes chunks in order, here or in `processes` others."""
    if processes == 1:
        tokenizer = load_tokenizer(recipe.tokenizer)
        yield lambda chunks: (encode_chunk(path, chunk, recipe, tokenizer) for chunk in chunks)
        return
    # Spawned, not forked: the parent may hold threads. Each has a pipe of its own, whose other
    # end is in the parent only, so that it leaves when the parent is killed.
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    workers = []
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, path, recipe), daemon=True)
            worker.start()
            theirs.close()
            pipes.append(ours)
            workers.append(worker)
        yield lambda chunks: _in_turn(pipes, chunks)
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.terminate()
            worker.join()


def _in_turn(pipes: list[Connection], chunks: Iterable[list[RawRecord]]) -> Iterator[Encoded]:
    """Keep every worker busy with one chunk; a worker gets its next when its last is taken."""
    idle, busy = deque(pipes), deque[Connection]()
    chunks = iter(chunks)
    chunk = next(chunks, None)
    while chunk is not None or busy:
        while chunk is not None and idle:
            pipe = idle.popleft()
            pipe.send(chunk)
            busy.append(pipe)
            chunk = next(chunks, None)
        pipe = busy.popleft()
        try:
            result = pipe.recv()
        except EOFError:
            raise RunError(
                "a process that tokenizes was ended from outside (out of memory?)"
            ) from None
        if isinstance(result, Exception):
            raise result
        idle.append(pipe)
        yield result


def _work(pipe: Connection, path: Path, recipe: Recipe) -> None:
    try:
        tokenizer = load_tokenizer(recipe.tokenizer)
        while True:
            pipe.send(encode_chunk(path, pipe.recv(), recipe, tokenizer))
    except DataError as error:
        pipe.send(error)
    except (EOFError, OSError, KeyboardInterrupt):
        return
    except Exception:
        pipe.send(RuntimeError(f"a process that tokenizes failed:\n{traceback.format_exc()}"))
