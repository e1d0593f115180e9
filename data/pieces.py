"""What of each record is trained when a row has room for ctx_len inputs, and batches made of it.

A piece of n tokens gives n - 1 inputs and n - 1 targets: the shift by one token happens here and
nowhere else. What is longer than ctx_len inputs is

    split   into consecutive pieces, each beginning with the last token of the one before, so
            that every target is trained once;
    cut     at ctx_len inputs;
    drop    left out.

"auto" splits plain text and cuts dialogues, whose later part means nothing without the first.
Pieces in which no target is scored are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.token_store import TokenStore
from rwkv.batch import TokenBatch, scored_places
from rwkv.errors import InputError

OVERLONG = ("auto", "split", "cut", "drop")


@dataclass(frozen=True)
class Pieces:
    """Stretches of a store's records, in the records' order.

    store: where the tokens are.
    record, start, stop: which tokens of which record each piece has, int64.
    scored: scored targets of each piece, int64.
    room: inputs that a row has room for.
    report: how many records were split, cut or left out, and scored targets lost by that.
    """

    store: TokenStore
    record: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    scored: np.ndarray
    room: int
    report: dict[str, int]

    @property
    def sizes(self) -> np.ndarray:
        """Inputs of each piece: the room it takes in a row."""
        return self.stop - self.start - 1

    def batch(self, rows: Sequence[np.ndarray], count: int, *, packed: bool) -> TokenBatch:
        """A batch of the given pieces.

        Args:
            rows: the numbers of the pieces in each row; where not packed, one a row.
            count: scored targets of the whole optimizer step.
            packed: True to put all rows end to end into one with cu_seqlens; False to stack them,
                padded at the right. No pieces at all give one padding token that is not scored.
        """
        numbers = [int(number) for row in rows for number in row]
        read = [
            self.store.read(int(self.record[n]), int(self.start[n]), int(self.stop[n]))
            for n in numbers
        ] or [(np.zeros(2, np.uint16), np.zeros(2, np.bool_))]
        lengths = np.array([len(tokens) - 1 for tokens, _ in read])
        if packed:
            ends = np.cumsum(lengths)
            rows_at, row_length = [(0, start) for start in ends - lengths], int(ends[-1])
            seqlens = torch.from_numpy(np.concatenate([[0], ends]))
        else:
            rows_at, row_length = [(row, 0) for row in range(len(read))], int(lengths.max())
            seqlens = None
        shape = (1 if packed else len(read), row_length)
        inputs, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.bool_)
        for (tokens, scored), (row, at) in zip(read, rows_at, strict=True):
            place = np.s_[row, at : at + len(tokens) - 1]
            inputs[place], targets[place], mask[place] = tokens[:-1], tokens[1:], scored[1:]
        where = torch.from_numpy(mask)
        return TokenBatch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            where,
            seqlens,
            torch.tensor(count),
            scored_places(where),
        )


def cut(store: TokenStore, ctx_len: int, overlong: str = "auto") -> Pieces:
    """The pieces of every record.

    Args:
        store: the records.
        ctx_len: inputs a piece may have, at least 1.
        overlong: one of OVERLONG.

    Raises:
        InputError: `ctx_len` or `overlong` is not allowed, or nothing is left to train.
    """
    if ctx_len < 1:
        raise InputError(f"--ctx_len {ctx_len}: must be at least 1; raise it")
    if overlong not in OVERLONG:
        raise InputError(f"--overlong {overlong}: is not one of {', '.join(OVERLONG)}; take one")
    lengths, records = store.lengths, np.arange(len(store))
    fits = lengths - 1 <= ctx_len
    if overlong == "auto":
        to_split = ~fits & ~store.dialogue
        to_cut = ~fits & store.dialogue
    else:
        to_split, to_cut = ~fits & (overlong == "split"), ~fits & (overlong == "cut")

    count = np.where(to_split, -(-(lengths - 1) // ctx_len), fits | to_cut)  # pieces a record
    record = np.repeat(records, count)
    nth = np.arange(len(record)) - np.repeat(np.cumsum(count) - count, count)
    start = nth * ctx_len
    stop = np.minimum(start + ctx_len + 1, lengths[record])
    scored = _scored(store, record, start, stop)
    kept = scored > 0
    if not kept.any():
        raise InputError(
            f"--ctx_len {ctx_len} --overlong {overlong}: no record has a token to score within "
            "that length; raise --ctx_len, or look at the mask with python -m data.show"
        )
    report = {
        "records": len(store),
        "split": int(to_split.sum()),
        "cut": int(to_cut.sum()),
        "dropped as too long": int((~fits).sum()) if overlong == "drop" else 0,
        "pieces without a scored target": int((~kept).sum()),
        "scored targets": int(scored.sum()),
        "scored targets lost": int(store.scored.sum() - scored.sum()),
    }
    return Pieces(store, record[kept], start[kept], stop[kept], scored[kept], ctx_len, report)


def _scored(
    store: TokenStore, record: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """Scored targets of each piece; the mask is read only where they cannot be told without."""
    sizes, whole = stop - start - 1, store.lengths - 1
    scored = np.where(sizes == whole[record], store.scored[record], sizes)
    partly = (sizes < whole[record]) & (store.scored < whole)[record]
    for piece in np.flatnonzero(partly):
        _, mask = store.read(int(record[piece]), int(start[piece]), int(stop[piece]))
        scored[piece] = np.count_nonzero(mask[1:])
    return scored
