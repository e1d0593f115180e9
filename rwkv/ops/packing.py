"""Texts packed end to end into one row: where each lies."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# On a GPU reading cu_seqlens waits for all work in flight, and every layer of a model asks for the
# same tensor: the answer is kept, with the tensor's version, as long as the tensor lives.
_known = WeakTensorKeyDictionary()
_known_starts = WeakTensorKeyDictionary()


def text_lengths(cu_seqlens: Tensor) -> list[int]:
    """The number of tokens of each packed text.

    Args:
        cu_seqlens: where each text starts, and the end of the last, [Q + 1].
    """
    if not cu_seqlens.is_cuda or cu_seqlens.is_inference():
        return cu_seqlens.diff().tolist()
    version, lengths = _known.get(cu_seqlens, (None, []))
    if version != cu_seqlens._version:
        lengths = cu_seqlens.diff().tolist()
        _known[cu_seqlens] = (cu_seqlens._version, lengths)
    return lengths


def text_starts(cu_seqlens: Tensor, rows: int, device: torch.device) -> Tensor:
    """For each token, the text that starts with it, or -1; for the end the number of texts.

    Args:
        cu_seqlens: where each text starts, and the end of the last, [Q + 1].
        rows: the number of tokens.
        device: of the result.

    Returns:
        [rows + 1], int32, made without waiting for the device.
    """
    known = not cu_seqlens.is_inference()
    if known:
        key = (cu_seqlens._version, rows, device)
        found, starts = _known_starts.get(cu_seqlens, (None, None))
        if found == key:
            return starts
    starts = torch.full((rows + 1,), -1, dtype=torch.int32, device=device)
    texts = torch.arange(cu_seqlens.shape[0], dtype=torch.int32, device=device)
    starts[cu_seqlens.to(device, torch.int64, non_blocking=True)] = texts
    if known and not starts.is_inference():
        _known_starts[cu_seqlens] = (key, starts)
    return starts


def check_packing(op: str, cu_seqlens: Tensor, B: int, T: int) -> None:
    """Raise ValueError unless cu_seqlens cuts one row of T tokens into texts of at least one."""
    if B != 1:
        raise ValueError(f"{op}: packed texts need B = 1, not B = {B}")
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
