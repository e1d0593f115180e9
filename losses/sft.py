"""Supervised fine-tuning: cross-entropy with label smoothing, and BlinkDL's L2Wrap."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.logprobs import (
    LanguageModel,
    TokenScores,
    at_places,
    score_logits,
    score_tokens,
    sum_over_tokens,
)
from rwkv.batch import TokenBatch
from rwkv.chunks import ChunkPlan, walk


def smoothed_nll(scores: TokenScores, smoothing: float) -> Tensor:
    """(1 - e) (-log p_target) + e (-mean over the vocabulary of log p), each token, [n], nats.

    Source: Szegedy et al., arXiv:1512.00567, section 7; as torch's cross_entropy has it.
    """
    return -(1 - smoothing) * scores.log_prob - smoothing * scores.mean_log_prob


def l2wrap(scores: TokenScores, factor: float) -> Tensor:
    """A term of value 0 whose gradient pulls each token's largest logit towards 0, a scalar.

    The gradient to the largest logit z is factor * z, summed over tokens; the caller divides by
    its count of tokens, as for the loss. Source: RWKV-LM, RWKV-v7/train_temp/src/model.py.
    """
    penalty = 0.5 * factor * scores.max_logit.square().sum()
    return penalty - penalty.detach()


@dataclass(frozen=True)
class SFT:
    """Cross-entropy of the scored tokens, divided by the count of the whole optimizer step.

    smoothing: label smoothing, in [0, 1).
    l2wrap: factor of L2Wrap; 1e-4 in RWKV-LM, 0 for none.
    chunks: how a long batch is walked in pieces; None for one piece.
    """

    smoothing: float = 0.0
    l2wrap: float = 1e-4
    chunks: ChunkPlan | None = None

    def __call__(self, model: LanguageModel, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch and metrics; both add up over the step's micro-batches."""

        def quantities(logits: Tensor, targets: Tensor) -> Tensor:
            scores = score_logits(logits, targets, given_up=True)
            loss = smoothed_nll(scores, self.smoothing).sum() + l2wrap(scores, self.l2wrap)
            nll = -scores.log_prob.detach().sum()
            return torch.stack([loss, nll, scores.hit.sum()])

        def sums(hidden: Tensor, piece: TokenBatch) -> Tensor:
            places = piece.scored_places()
            some, targets = at_places(hidden, places), at_places(piece.targets, places)
            return sum_over_tokens(model, some, (targets,), quantities)

        loss, nll, hits = walk(model, batch, sums, self.chunks) / batch.count.clamp_min(1)
        return loss, {"nll": nll.detach(), "accuracy": hits.detach()}

    def measure(self, model: LanguageModel, batch: TokenBatch) -> Tensor:
        """(summed nll, correct tokens, scored tokens) of a held-out batch, [3], float64."""

        def sums(hidden: Tensor, piece: TokenBatch) -> Tensor:
            places = piece.scored_places()
            some, targets = at_places(hidden, places), at_places(piece.targets, places)
            scores = score_tokens(model, some, targets)
            count = scores.log_prob.new_tensor(len(places))
            return torch.stack([-scores.log_prob.sum(), scores.hit.sum(), count])

        with torch.no_grad():
            return walk(model, batch, sums, self.chunks).double()

    def summarize(self, total: list[float]) -> dict[str, float]:
        """From added-up measures: loss in nats a token, perplexity, share of tokens right."""
        nll, correct, scored = total
        loss = nll / max(scored, 1)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": correct / max(scored, 1),
        }
