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
    tempered: log-sum-exp of the logits divided by a temperature; None where none was given.
    """

    lse: Tensor
    target: Tensor
    mean: Tensor
    largest: Tensor
    ties: Tensor
    tempered: Tensor | None = None


class Few(NamedTuple):
    """What a divergence over few tokens sends back to n rows of logits.

    tempered: the gradient of the log-sum-exp at the temperature, [n].
    temperature: as given to `read_logits`.
    ids: some tokens of each row, [n, k], int64.
    logits: the gradient of their logits, [n, k]; it adds up where an id comes twice.
    """

    tempered: Tensor
    temperature: float
    ids: Tensor
    logits: Tensor


def without_copies(logits: Tensor) -> bool:
    """Whether logits of this dtype and device are read as they are: no float32 copies are made."""
    return uses_kernels(logits.new_empty(1))


def read_logits(logits: Tensor, targets: Tensor, temperature: float | None = None) -> LogitScores:
    """The scores of logits [n, V] with targets [n], int64; without history.

    temperature: of `tempered`, > 0; None to leave it out.
    """
    logits = logits.detach()
    if uses_kernels(logits):
        from rwkv.ops.logit_scores_triton import read_logits as run

        return LogitScores(*run(logits, targets, temperature))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(dim=-1)
    return LogitScores(
        torch.logsumexp(logits, dim=-1),
        logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        logits.mean(dim=-1),
        largest,
        (logits == largest.unsqueeze(-1)).sum(dim=-1).to(logits.dtype),
        None if temperature is None else torch.logsumexp(logits / temperature, dim=-1),
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
    few: Few | None = None,
    out: Tensor,
) -> Tensor:
    """The gradient of logits, given that of each quantity that was read from them.

        target [v = t] + mean / V + lse exp(z_v - lse) + largest [z_v is largest] / ties
        + few.tempered / T exp(z_v / T - tempered) + few.logits_i [v = few.ids_i], added over i

    Args:
        logits, targets: as given to `read_logits`.
        scores: what it returned, with `tempered` where there is `few`.
        target, mean, lse, largest: the gradient of each, [n].
        few: the rest of the gradient; None for none.
        out: where to write it, [n, V], contiguous; may be `logits`.

    Returns:
        out.
    """
    weights = [target, mean / logits.shape[-1], lse, largest / scores.ties]
    if few is not None:
        weights.append(few.tempered / few.temperature)
    if uses_kernels(logits):
        from rwkv.ops.logit_scores_triton import logit_gradient as run

        return run(logits, targets, scores, torch.stack(weights), few, out)
    at_target, everywhere, by_share, at_largest, *by_tempered = (w.unsqueeze(-1) for w in weights)
    wide = logits.to(scores.lse.dtype)
    gradient = by_share * torch.exp(wide - scores.lse.unsqueeze(-1)) + everywhere
    gradient += at_largest * (wide == scores.largest.unsqueeze(-1))
    gradient.scatter_add_(-1, targets.unsqueeze(-1), at_target.to(gradient.dtype))
    if few is not None:
        assert scores.tempered is not None
        share = torch.exp(wide / few.temperature - scores.tempered.unsqueeze(-1))
        gradient += by_tempered[0] * share
        gradient.scatter_add_(-1, few.ids, few.logits.to(gradient.dtype))
    return out.copy_(gradient)
