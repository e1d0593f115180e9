"""What losses need of logits, and the gradient it sends back, each in one pass over them.

The plain torch here is the reference and runs everywhere; on a GPU two Triton kernels read the
logits once, in their own dtype, and compute in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv.ops.fused import uses_kernels


class LogitScores(NamedTuple):
    """Quantities of n rows of logits, each [n], in float32 (float64 for float64 logits).

    lse: log-sum-exp over the vocabulary.
    target: the logit of the target.
    mean: mean logit.
    largest: largest logit.
    ties: how many logits are the largest.
    """

    lse: Tensor
    target: Tensor
    mean: Tensor
    largest: Tensor
    ties: Tensor


def without_copies(logits: Tensor) -> bool:
    """Whether logits of this dtype and device are read as they are: no float32 copies are made."""
    return uses_kernels(logits.new_empty(1))


def read_logits(logits: Tensor, targets: Tensor) -> LogitScores:
    """The scores of logits [n, V] with targets [n], int64; without history."""
    logits = logits.detach()
    if uses_kernels(logits):
        from rwkv.ops.logit_scores_triton import read_logits as run

        return LogitScores(*run(logits, targets))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(dim=-1)
    return LogitScores(
        torch.logsumexp(logits, dim=-1),
        logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        logits.mean(dim=-1),
        largest,
        (logits == largest.unsqueeze(-1)).sum(dim=-1).to(logits.dtype),
    )


def logit_gradient(
    logits: Tensor,
    targets: Tensor,
    scores: LogitScores,
    *,
    target: Tensor,
    mean: Tensor,
    lse: Tensor,
    largest: Tensor,
    out: Tensor,
) -> Tensor:
    """The gradient of logits, given that of each quantity that was read from them.

        target [v = t] + mean / V + lse exp(z_v - lse) + largest [z_v is largest] / ties

    Args:
        logits, targets: as given to `read_logits`.
        scores: what it returned.
        target, mean, lse, largest: the gradient of each, [n].
        out: where to write it, [n, V], contiguous; may be `logits`.

    Returns:
        out.
    """
    weights = torch.stack([target, mean / logits.shape[-1], lse, largest / scores.ties])
    if uses_kernels(logits):
        from rwkv.ops.logit_scores_triton import logit_gradient as run

        return run(logits, targets, scores.lse, scores.largest, weights, out)
    at_target, everywhere, by_share, at_largest = weights.unsqueeze(-1)
    wide = logits.to(scores.lse.dtype)
    gradient = by_share * torch.exp(wide - scores.lse.unsqueeze(-1)) + everywhere
    gradient += at_largest * (wide == scores.largest.unsqueeze(-1))
    gradient.scatter_add_(-1, targets.unsqueeze(-1), at_target.to(gradient.dtype))
    return out.copy_(gradient)
