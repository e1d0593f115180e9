"""Log-probabilities of given tokens: the one definition that training, reference files and
evaluation share."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rwkv.recompute import recomputed
from rwkv.scattered import most_of_all_ranks

MAX_LOGITS = 2**26  # logits alive at once: 256 MiB in float32


class LanguageModel(Protocol):
    """What losses need of a model: hidden states from tokens, logits from hidden states."""

    def __call__(
        self, tokens: Tensor, state: object = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, object]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


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
    """Score targets [n] from hidden states [n, C], without ever holding all n x V logits."""
    return TokenScores(*map_logits(model, hidden, (targets,), score_logits))


def map_logits(
    model: LanguageModel,
    hidden: Tensor,
    arguments: Sequence[Tensor],
    function: Callable[..., Sequence[Tensor]],
) -> tuple[Tensor, ...]:
    """Apply a function to the logits at n positions, without ever holding all n x V of them.

    The head runs on a piece of the positions at a time and runs again in the backward pass.

    Args:
        model: whose head.
        hidden: hidden states, [n, C].
        arguments: what the function takes beside the logits, each [n, ...].
        function: (logits [m, V], *arguments [m, ...]) -> tensors [m, ...], for any m.

    Returns:
        the function's tensors, each [n, ...].
    """
    V = int(model.logits(hidden[:0]).shape[-1])
    rows = max(1, MAX_LOGITS // V)

    def piece(h: Tensor, *some: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(model.logits(h), *some))

    tensors = (hidden, *arguments)
    parts = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
    missing = most_of_all_ranks(len(parts), model, hidden.device) - len(parts)
    parts += [tuple(tensor[:0] for tensor in tensors)] * missing
    pieces = [recomputed(piece, *part, model=model) for part in parts]
    return tuple(torch.cat(field) for field in zip(*pieces, strict=True))
