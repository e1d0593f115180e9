"""Log-probabilities of given tokens: the one definition that training, reference files and
evaluation share."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**26  # logits alive at once: 256 MiB in float32


class LanguageModel(Protocol):
    """What losses need of a model: hidden states from tokens, logits from hidden states."""

    def __call__(
        self, tokens: Tensor, state: object = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, object]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class TokenScores(NamedTuple):
    """What the losses need of the logits at n positions, each [n], float32.

    log_prob: log-probability of the target, in nats.
    mean_log_prob: mean log-probability over the whole vocabulary (label smoothing's other part).
    max_logit: the largest logit (L2Wrap's).
    hit: 1 where the target has the largest logit, else 0; without gradient.
    """

    log_prob: Tensor
    mean_log_prob: Tensor
    max_logit: Tensor
    hit: Tensor


def score_logits(logits: Tensor, targets: Tensor) -> TokenScores:
    """Score targets [n] under logits [n, V]; the softmax runs in float32 at least.

    `targets` are the inputs moved one to the left: the logits at position t score the token that
    follows t. No function below this one shifts again.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = torch.logsumexp(logits, dim=-1)
    target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    largest = logits.amax(dim=-1)
    hit = (target.detach() >= largest.detach()).to(logits.dtype)
    return TokenScores(target - total, logits.mean(dim=-1) - total, largest, hit)


def score_tokens(model: LanguageModel, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Score targets [n] from hidden states [n, C], without ever holding all n x V logits.

    The head runs on a piece of the positions at a time and runs again in the backward pass.
    """
    V = int(model.logits(hidden[:0]).shape[-1])
    rows = max(1, MAX_LOGITS // V)

    def piece(h: Tensor, t: Tensor) -> TokenScores:
        return score_logits(model.logits(h), t)

    if hidden.shape[0] <= rows:
        pieces = [_recomputed(piece, hidden, targets)]
    else:
        pieces = [
            _recomputed(piece, h, t)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    return TokenScores(*(torch.cat(field) for field in zip(*pieces, strict=True)))


def _recomputed(function, hidden: Tensor, targets: Tensor) -> TokenScores:
    if not torch.is_grad_enabled():
        return function(hidden, targets)
    return checkpoint(function, hidden, targets, use_reentrant=False)
