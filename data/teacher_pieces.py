"""Batches of records with a teacher's scores."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from data import pieces
from rwkv.batch import TeacherBatch

if TYPE_CHECKING:
    from data.teacher_store import TeacherStore


class TeacherPieces(pieces.Pieces):
    """Stretches of a TeacherStore's records."""

    store: "TeacherStore"

    def batch(  # type: ignore[override]
        self, rows: Sequence[np.ndarray], count: int, *, packed: bool
    ) -> TeacherBatch:
        """A batch of the given pieces; as Pieces.batch, with the scores of each input."""
        tokens = super().batch(rows, count, packed=packed)
        numbers = [int(number) for row in rows for number in row]
        shape = tuple(tokens.inputs.shape)
        ids = np.zeros((*shape, self.store.k), np.uint16)
        values = np.zeros((*shape, self.store.k), np.float16)
        lse = np.zeros(shape, np.float32)
        at = 0
        for row, number in enumerate(numbers):
            first, size = int(self.start[number]), int(self.sizes[number])
            place = np.s_[0, at : at + size] if packed else np.s_[row, :size]
            found = self.store.scores(int(self.record[number]), first, first + size)
            ids[place], values[place] = found[:2]
            if found[2] is not None:
                lse[place] = found[2]
            at += size
        return TeacherBatch(
            **tokens._asdict(),
            ids=torch.from_numpy(ids.view(np.int16)),
            values=torch.from_numpy(values.view(np.int16)),
            lse=torch.from_numpy(lse.view(np.int32)) if self.store.wanted.normalized else None,
        )


def cut(store: "TeacherStore", ctx_len: int, overlong: str) -> TeacherPieces:
    """The pieces of every record; see data.pieces.cut."""
    return TeacherPieces(**vars(pieces.cut(store, ctx_len, overlong)))
