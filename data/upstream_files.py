"""Files in the formats of RWKV-LM-RLHF.

SFT and distillation .h5: `tokens`, one array of token ids a record. They carry no mask, so every
token is scored, and no name of the tokenizer that made them. Distillation files have besides
`top_k_values` and `top_k_indices`, k logits and ids a token, end to end; k is what their length
says, and the log-sum-exp over the vocabulary is not known.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.records import DataError, check_file
from data.tokenizing import Encoded
from rwkv.errors import RunError
from rwkv.tokenizer import Tokenizer

RECORDS_A_READ = 1024


def read_sft_h5(
    path: Path, tokenizer: Tokenizer, progress: Callable[[int, int, int], None]
) -> Iterator[Encoded]:
    """Yield the records of an SFT .h5 file; one that lacks an end of text gets it.

    Args:
        path: the file.
        tokenizer: its vocabulary bounds the ids.
        progress: called now and then with records read, records in all, and records read.

    Raises:
        DataError: the file is no HDF5, has no `tokens` as described above, or a record is empty
            or has ids outside the vocabulary.
    """
    with open_h5(path) as file:
        tokens = _dataset(path, file, "tokens")
        for first in range(0, len(tokens), RECORDS_A_READ):
            rows = [np.asarray(row) for row in tokens[first : first + RECORDS_A_READ]]
            for number, row in enumerate(rows, start=first):
                _check_ids(f"{path}: tokens[{number}]", row, tokenizer)
            progress(first + len(rows), len(tokens), first + len(rows))
            yield _encoded(rows, tokenizer.end_of_text)


def distillation_k(path: Path) -> int:
    """How many scores a token of a distillation .h5 file has.

    Raises:
        DataError: it is no such file, or its first record's scores do not come out even.
    """
    with open_h5(path) as file:
        tokens, ids = _dataset(path, file, "tokens"), _dataset(path, file, "top_k_indices")
        if not len(tokens):
            raise DataError(f"{path}: has no records; is it the right file?")
        return _k(path, 0, len(tokens[0]), len(ids[0]))


def read_distillation_h5(
    path: Path, tokenizer: Tokenizer
) -> Iterator[tuple[Encoded, np.ndarray, np.ndarray]]:
    """Yield the records of a distillation .h5 file with their scores.

    Args:
        path: the file.
        tokenizer: its vocabulary bounds the ids.

    Returns:
        records, and the ids and logits of their tokens, [tokens, k], uint16 and float16 (upstream
        takes its logits from bfloat16, which float16 holds exactly where they are not tiny),
        largest first.

    Raises:
        DataError: the file is not as described above, or k differs between records.
    """
    k = distillation_k(path)
    with open_h5(path) as file:
        tokens, ids = _dataset(path, file, "tokens"), _dataset(path, file, "top_k_indices")
        values = _dataset(path, file, "top_k_values", kinds="f")
        for number in range(len(tokens)):
            row = np.asarray(tokens[number])
            where = f"{path}: tokens[{number}]"
            _check_ids(where, row, tokenizer)
            for scores in (ids[number], values[number]):
                if _k(path, number, len(row), len(scores)) != k:
                    raise DataError(
                        f"{where}: has {len(scores)} scores for {len(row)} tokens, record 0 has "
                        f"{k} a token; make the file again"
                    )
            numbers = np.asarray(values[number], np.float16).reshape(-1, k)
            names = np.asarray(ids[number]).reshape(-1, k)
            _check_ids(f"{path}: top_k_indices[{number}]", names.ravel(), tokenizer)
            order = np.argsort(-numbers, axis=1, kind="stable")
            yield (
                _encoded([row], None),
                np.take_along_axis(names, order, axis=1).astype(np.uint16),
                np.take_along_axis(numbers, order, axis=1),
            )


def _k(path: Path, number: int, tokens: int, scores: int) -> int:
    """Scores a token, from the lengths of a record's arrays."""
    if not tokens or not scores or scores % tokens:
        raise DataError(
            f"{path}: record {number} has {scores} scores for {tokens} tokens, which is no whole "
            "number a token; is it a distillation file?"
        )
    return scores // tokens


@contextlib.contextmanager
def open_h5(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for reading; one that is not whole is a DataError, here or within."""
    check_file(path)
    try:
        import h5py
    except ImportError:
        raise RunError(f"{path}: .h5 files need the package h5py; pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:  # what h5py makes of damaged parts
        raise DataError(
            f"{path}: not a whole HDF5 file ({error}); fetch or make it again"
        ) from None


def _dataset(path: Path, file: Any, name: str, kinds: str = "iu") -> Any:
    """An array of one array a record; `kinds` are numpy's letters of the types it may have."""
    import h5py

    data = file.get(name)
    if not isinstance(data, h5py.Dataset):
        found = ", ".join(file) or "nothing"
        raise DataError(f"{path}: has no array {name!r}, only {found}; is it the right file?")
    kind = h5py.check_vlen_dtype(data.dtype)
    if len(data.shape) != 1 or kind is None or np.dtype(kind).kind not in kinds:
        raise DataError(
            f"{path}: {name!r} has shape {list(data.shape)} and type {data.dtype}; needed is one "
            f"array of {'whole ' if kinds == 'iu' else ''}numbers a record"
        )
    return data


def _check_ids(where: str, row: np.ndarray, tokenizer: Tokenizer) -> None:
    if not len(row):
        raise DataError(f"{where}: the record is empty; make the file again without it")
    worst = row.min() if row.min() < 0 else row.max()
    if not 0 <= worst < tokenizer.vocab_size:
        raise DataError(
            f"{where}: has the token {worst}, tokenizer {tokenizer.name} has 0 to "
            f"{tokenizer.vocab_size - 1}; was the file made with another tokenizer?"
        )


def _encoded(rows: list[np.ndarray], end_of_text: int | None) -> Encoded:
    notes = Counter[str]()
    if end_of_text is not None:
        notes["ends of text added"] = sum(int(row[-1] != end_of_text) for row in rows)
        rows = [row if row[-1] == end_of_text else np.append(row, end_of_text) for row in rows]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.concatenate(rows).astype(np.uint16)
    mask = np.ones(len(tokens), dtype=np.bool_)
    mask[np.cumsum(lengths) - lengths] = False
    return Encoded(tokens, mask, lengths, np.zeros(len(rows), dtype=np.bool_), notes)
