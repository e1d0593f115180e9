"""Odds ratio preference optimization. Source: arXiv:2403.07691, eq. 6 and 7."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.preference import PAIR_METRICS, Answers, pair_metrics

SURE = -1e-7  # the largest average log-probability: an answer of probability 1 has infinite odds


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends.

    Near 0 the difference 1 - exp(x) cancels, far from 0 exp(x) vanishes beside 1; log 2 is where
    the two forms are equally good.
    """
    near = x > -math.log(2)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log of odds(chosen) / odds(rejected), odds(p) = p / (1 - p), each [B].

    Args:
        chosen, rejected: average log-probability of each answer's tokens, [B], in nats, <= 0; what
            is above -1e-7 counts as -1e-7. Sums would make the odds vanish: exp(-500) is 0 in
            float32.
    """
    chosen, rejected = chosen.clamp(max=SURE), rejected.clamp(max=SURE)
    return (chosen - rejected) - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))


def orpo_loss(chosen: Answers, rejected: Answers) -> Tensor:
    """-log sigmoid(log odds ratio) of each pair, [B]: the part of ORPO that compares answers.

    The paper's loss is the chosen answers' cross-entropy + 0.1 times this.
    """
    return -F.logsigmoid(log_odds_ratio(chosen.mean, rejected.mean))


@dataclass(frozen=True)
class ORPO:
    """weight * orpo_loss; the objective adds the chosen answers' cross-entropy.

    weight: the paper's lambda, > 0; 0.1 there.
    """

    weight: float = 0.1

    needs_reference: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = (*PAIR_METRICS, "log_odds")

    def __call__(self, chosen: Answers, rejected: Answers) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Each pair's loss and, in the order of `metrics`, its metrics, all [B]."""
        better, worse = self.weight * chosen.mean, self.weight * rejected.mean
        return self.weight * orpo_loss(chosen, rejected), (
            *pair_metrics(better, worse, chosen.mean, rejected.mean),
            log_odds_ratio(chosen.mean, rejected.mean),
        )
