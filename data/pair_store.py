"""Preference records on disk: a token store whose records are a prompt and its answers.

    tokens.npy    uint16; of each record the prompt, the chosen and the rejected answer, end to end
    ends.npy      int64, for each record the index after its last token
    prompt.npy    int64, tokens of each record's prompt
    chosen.npy, rejected.npy    int64, tokens of each answer; 0 where a record has one answer only
    meta.json     counts, tokenizer, template, sources

Reference scores lie beside them, in files of their own: data/reference_scores.py.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.token_store import Records, TokenStore, write_arrays

if TYPE_CHECKING:
    from data.pair_pieces import Pair, PairPieces


class EncodedPairs(NamedTuple):
    """Records one after another.

    tokens: uint16, all records end to end.
    lengths: of prompt, chosen and rejected answer of each record, int64, [records, 3].
    notes: what was left out, counted under words for the user.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    notes: Counter[str]


class PairStore(TokenStore):
    """Preference records of one or more folders, or some of them.

    longest: tokens that a prompt and one answer may have together; 0 for what fits a row.
    reference: each record's two reference scores, float32, [records, 2]; None where there are none.
    """

    kind = "preference"
    token_arrays = ("tokens",)
    record_arrays = ("prompt", "chosen", "rejected")

    def __init__(self, folders: Sequence[Path], chosen: np.ndarray | None = None):
        super().__init__(folders, chosen)
        self.longest = 0
        self.reference: np.ndarray | None = None

    @property
    def numbers(self) -> np.ndarray:
        """The number of each record among all records of the folders."""
        return np.arange(len(self)) if self._chosen is None else self._chosen

    def __reduce__(self) -> Any:
        rebuild, arguments = super().__reduce__()
        return rebuild, arguments, {"longest": self.longest, "reference": self.reference}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def select(self, numbers: np.ndarray) -> "PairStore":
        """A store of these records only, in this order, over the same files."""
        selected = super().select(numbers)
        assert isinstance(selected, PairStore)
        selected.longest = self.longest
        selected.reference = None if self.reference is None else self.reference[numbers]
        return selected

    def pair(self, number: int) -> "Pair":
        """A record's prompt and answers."""
        from data.pair_pieces import Pair  # torch, which tokenizing processes do without

        (tokens,) = self.read(number, 0, int(self.lengths[number]))
        borders = [int(self.by_record[name][number]) for name in ("prompt", "chosen")]
        prompt, chosen, rejected = np.split(tokens, np.cumsum(borders))
        if self.reference is None:
            return Pair(prompt, chosen, rejected)
        better, worse = self.reference[number].tolist()
        return Pair(prompt, chosen, rejected, (better, worse))

    def pieces(self, ctx_len: int, overlong: str = "auto") -> "PairPieces":  # type: ignore[override]
        """The records that fit a row."""
        from data.pair_pieces import cut_pairs

        return cut_pairs(self, ctx_len, overlong)


def write_pairs(
    folder: Path, chunks: Iterable[EncodedPairs], meta: dict[str, Any]
) -> dict[str, Any]:
    """Write encoded records as a folder, all of it or nothing; return its meta.json.

    Args:
        folder: the folder to make; one that is there is replaced.
        chunks: the records; at least one.
        meta: what is to stand in meta.json besides counts.

    Raises:
        DataError: there is no record.
    """

    def records() -> Iterator[Records]:
        for chunk in chunks:
            arrays = dict(zip(("prompt", "chosen", "rejected"), chunk.lengths.T, strict=True))
            pairs = int((chunk.lengths > 0).all(axis=1).sum())
            lengths = chunk.lengths.sum(axis=1)
            yield Records(
                {"tokens": chunk.tokens, **arrays}, lengths, {"pairs": pairs}, chunk.notes
            )

    kinds = {"tokens": np.uint16} | dict.fromkeys(("prompt", "chosen", "rejected"), np.int64)
    meta = {"kind": PairStore.kind, **meta}
    return write_arrays(folder, records(), kinds, meta)
