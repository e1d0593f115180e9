"""Simple preference optimization, without a reference model. Source: arXiv:2405.14734, eq. 6."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from losses.preference import PAIR_METRICS, Answers, pair_metrics


def simpo_loss(chosen: Answers, rejected: Answers, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (A_chosen - A_rejected) - gamma) of each pair, [B].

    Args:
        chosen, rejected: of the same pairs; A is the average log-probability of a token.
        beta: scale of the averages, > 0; 2 to 2.5 in the paper.
        gamma: the margin that is asked for, >= 0; 0.3 to 0.5 times beta in the paper.
    """
    return -F.logsigmoid(beta * (chosen.mean - rejected.mean) - gamma)


@dataclass(frozen=True)
class SimPO:
    """simpo_loss with the metrics of TRL; `beta` and `gamma` as there."""

    beta: float = 2.0
    gamma: float = 1.0

    needs_reference: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS

    def __call__(self, chosen: Answers, rejected: Answers) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Each pair's loss and, in the order of `metrics`, its metrics, all [B]."""
        loss = simpo_loss(chosen, rejected, beta=self.beta, gamma=self.gamma)
        better, worse = self.beta * chosen.mean, self.beta * rejected.mean
        return loss, pair_metrics(better, worse, chosen.mean, rejected.mean)
