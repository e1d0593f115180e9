"""Token shift: each token sees the one before it."""

import torch
from torch import Tensor


def token_shift(x: Tensor, last: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return x moved one token to the right.

    Training, chunks, packed rows and generation all use this one function; they differ in `last`.

    Args:
        x: [B, T, C]; packed rows have B = 1.
        last: the token before each sequence's first, [Q, C], zeros for a new text. Q is B, or the
            number of packed texts, so that nothing leaks from one text into the next.
        cu_seqlens: where packed texts start and end in T, [Q + 1], as in wkv7.

    Returns:
        [B, T, C].
    """
    if cu_seqlens is None:
        return torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1)
    shifted = torch.cat([x[:, :1], x], dim=1)  # a place behind the end, for empty texts there
    return shifted.index_copy(1, cu_seqlens[:-1], last.unsqueeze(0))[:, :-1]


def last_token(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each sequence's last token, [Q, C]: the `last` of the tokens that follow.

    It is a copy: a state would else keep all of x alive.
    """
    return x[:, -1].clone() if cu_seqlens is None else x[0, cu_seqlens[1:] - 1]
