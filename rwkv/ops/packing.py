"""Texts packed end to end into one row: where each lies."""

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# On a GPU reading cu_seqlens waits for all work in flight, and every layer of a model asks for the
# same tensor: the answer is kept, with the tensor's version, as long as the tensor lives.
_known = WeakTensorKeyDictionary()


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
