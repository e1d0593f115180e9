"""Texts packed end to end into one row: where each lies."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Every layer of a model asks the same of one cu_seqlens, and on a GPU reading it waits for all work
# in flight: answers are kept, with the tensor's version, as long as the tensor lives.
_known = WeakTensorKeyDictionary()


def known(cu_seqlens: Tensor, question: Hashable, answer: Callable[[], Any]) -> Any:
    """What `answer` returns, asked once for each question and value of cu_seqlens."""
    if cu_seqlens.is_inference():  # it has no version
        return answer()
    version, answers = _known.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        answers = {}
        _known[cu_seqlens] = cu_seqlens._version, answers
    if question in answers:
        return answers[question]
    found = answer()
    if not (isinstance(found, Tensor) and found.is_inference()):  # training could not use it
        answers[question] = found
    return found


def text_lengths(cu_seqlens: Tensor) -> list[int]:
    """The number of tokens of each packed text.

    Args:
        cu_seqlens: where each text starts, and the end of the last, [Q + 1].
    """
    return known(cu_seqlens, "lengths", lambda: cu_seqlens.diff().tolist())


def remember_lengths(cu_seqlens: Tensor, lengths: Sequence[int]) -> None:
    """Spare text_lengths the reading.

    Args:
        cu_seqlens: as on the device.
        lengths: what it gives, read before it went there.
    """
    known(cu_seqlens, "lengths", lambda: list(lengths))


def text_starts(cu_seqlens: Tensor, rows: int, device: torch.device) -> Tensor:
    """For each token, the text that starts with it, or -1; for the end the number of texts.

    Empty texts behind the last one are not counted.

    Args:
        cu_seqlens: where each text starts, and the end of the last, [Q + 1].
        rows: the number of tokens.
        device: of the result.

    Returns:
        [rows + 1], int32, made without waiting for the device.
    """

    def make() -> Tensor:
        starts = torch.full((rows + 2,), -1, dtype=torch.int32, device=device)
        texts = torch.arange(cu_seqlens.shape[0], dtype=torch.int32, device=device)
        borders = cu_seqlens.to(device, torch.int64, non_blocking=True)
        again = borders.diff(prepend=borders.new_full((1,), -1)) == 0
        starts[borders.masked_fill(again, rows + 1)] = texts  # the last place is nobody's
        return starts[:-1]

    return known(cu_seqlens, ("starts", rows, device), make)


def check_packing(op: str, cu_seqlens: Tensor, B: int, T: int) -> None:
    """Raise ValueError unless cu_seqlens cuts one row of T tokens into texts of at least one.

    Where torch.compile traces, the values are not there to be checked.
    """
    if B != 1:
        raise ValueError(f"{op}: packed texts need B = 1, not B = {B}")
    if torch.compiler.is_compiling():
        return
    lengths = text_lengths(cu_seqlens)
    if min(lengths, default=0) < 1:
        raise ValueError(
            f"{op}: each packed text needs a token, but cu_seqlens gives the lengths {lengths}"
        )
    if sum(lengths) != T:
        raise ValueError(f"{op}: cu_seqlens covers {sum(lengths)} tokens, T is {T}")


def count_slots(B: int, T: int, cu_seqlens: Tensor | None, C: int) -> int:
    """The number of chunks of C tokens to make room for, known without reading cu_seqlens.

    That of B rows of T tokens, or of one row that is packed: there text q begins at chunk
    cu_seqlens[q] // C + q, which leaves room for texts of any lengths.
    """
    if cu_seqlens is None:
        return B * -(-T // C)
    return T // C + cu_seqlens.shape[0] - 1
