"""What a batch is: data/ makes these, losses/ reads them.

Named tuples, because torch pins their tensors and Lightning moves them; Lightning refuses frozen
dataclasses and torch leaves any dataclass unpinned.
"""

from typing import NamedTuple

from torch import Tensor


class TokenBatch(NamedTuple):
    """Rows of tokens with the next token of each, all [B, T].

    inputs, targets: token ids, int64; targets[:, t] follows inputs[:, t].
    mask: bool, true where the loss counts the target: answers, not prompts or padding.
    cu_seqlens: for texts packed into B = 1, where each starts, and T, [Q + 1], int64; else None.
    count: scored targets of the whole optimizer step, over all its micro-batches and ranks, an
        int64 scalar (an integer, because trainers cast the floats of a batch). Every loss is a sum
        divided by it, so that no way of cutting a step changes the number.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None
    count: Tensor

    def tokens(self) -> int:
        """Input tokens that the model reads, padding included."""
        return self.inputs.numel()
