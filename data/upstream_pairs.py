"""Preference files of RWKV-LM-RLHF, which hold tokens.

`.save`: a list of (prompt, chosen, rejected, reference of chosen, reference of rejected), written
by torch.save. The references are sums of log-probabilities of an unnamed model, or 0.5 where there
are none. `.h5`: `prompttokens`, `chosentokens`, `rejecttokens`, `chosenprob`, `rejectprob`; its
references are averages taken one token off, of no use. Neither kind is trained on: nobody can tell
which model they are of.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.records import DataError, check_file
from data.upstream_files import open_h5
from rwkv.checkpoint import UNREADABLE
from rwkv.files import replacing
from rwkv.tokenizer import Tokenizer

SAVE_SUFFIX = ".save"
NO_REFERENCE = 0.5


class TokenPair(NamedTuple):
    """Token ids of a prompt and its answers, and the file's reference scores of the answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    ref_chosen: float = NO_REFERENCE
    ref_rejected: float = NO_REFERENCE


def read_save(path: Path, tokenizer: Tokenizer) -> Iterator[TokenPair]:
    """Yield the records of a .save file.

    Raises:
        DataError: it holds pickled code, is no such list, or has ids outside the vocabulary.
    """
    check_file(path)
    import torch

    try:
        records = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}: holds pickled code or is damaged, and is not opened ({first[:160]}); make "
            "it again from its CSV file"
        ) from None
    if not isinstance(records, list):
        raise DataError(
            f"{path}: holds a {type(records).__name__}, not a list of pairs; is it the right file?"
        )
    for number, record in enumerate(records):
        where = f"{path}: record {number}"
        if not isinstance(record, (tuple, list)) or len(record) < 3:
            raise DataError(
                f"{where}: is no tuple of prompt, chosen and rejected tokens; make the file again"
            )
        parts = [_ids(where, part, tokenizer) for part in record[:3]]
        scores = [NO_REFERENCE] * 2
        if len(record) >= 5 and all(isinstance(x, (int, float)) for x in record[3:5]):
            scores = [float(x) for x in record[3:5]]
        yield TokenPair(parts[0], parts[1], parts[2], scores[0], scores[1])


def write_save(path: Path, pairs: Iterable[TokenPair]) -> None:
    """Write pairs as a .save file, whole or not at all."""
    import torch

    records = [tuple(pair) for pair in pairs]
    with replacing(path) as beside, beside.open("wb") as file:
        torch.save(records, file)


def read_pairs_h5(path: Path, tokenizer: Tokenizer) -> Iterator[TokenPair]:
    """Yield the records of a preference .h5 file.

    Raises:
        DataError: it is no HDF5, lacks an array, or has ids outside the vocabulary.
    """
    names = ("prompttokens", "chosentokens", "rejecttokens")
    with open_h5(path) as file:
        missing = [name for name in names if name not in file]
        if missing:
            found = ", ".join(file) or "nothing"
            raise DataError(
                f"{path}: has no array {missing[0]!r}, only {found}; is it a preference file?"
            )
        scores = [file.get(name) for name in ("chosenprob", "rejectprob")]
        arrays = [file[name] for name in names]
        lengths = [len(array) for array in (*arrays, *scores) if array is not None]
        if len(set(lengths)) > 1:
            raise DataError(
                f"{path}: its arrays have {', '.join(map(str, lengths))} records; make it again"
            )
        for number, parts in enumerate(zip(*arrays, strict=True)):
            ids = [_ids(f"{path}: record {number}", np.asarray(part), tokenizer) for part in parts]
            given = [NO_REFERENCE if s is None else float(s[number]) for s in scores]
            yield TokenPair(ids[0], ids[1], ids[2], given[0], given[1])


def _ids(where: str, values: Any, tokenizer: Tokenizer) -> list[int]:
    try:
        ids = np.asarray(values)
    except ValueError:
        ids = np.empty(0, object)
    if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
        raise DataError(f"{where}: tokens are no list of whole numbers; make the file again")
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(
            f"{where}: has the token {worst}, tokenizer {tokenizer.name} has 0 to "
            f"{tokenizer.vocab_size - 1}; was the file made with another tokenizer?"
        )
    return ids.astype(np.int64).tolist()
