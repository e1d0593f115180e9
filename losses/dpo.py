"""Direct preference optimization and its relatives: losses of pairs against a reference model.

Sources: DPO arXiv:2305.18290, eq. 7; IPO arXiv:2310.12036, with averages over tokens as its authors
compute it; hinge arXiv:2305.10425 (SLiC-HF); robust arXiv:2403.00409; cdpo: the note on
conservative DPO by E. Mitchell, 2023; length-normalized arXiv:2411.15124, section 5.1.2.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from losses.preference import PAIR_METRICS, Answers, pair_metrics

KINDS = ("sigmoid", "ipo", "hinge", "robust", "cdpo", "length-normalized")


def dpo_loss(
    chosen: Answers, rejected: Answers, *, beta: float, kind: str = "sigmoid", flipped: float = 0.0
) -> Tensor:
    """The loss of each pair, [B], with D = h_chosen - h_rejected and s the logistic function.

        h = log-probability of an answer under the policy - under the reference, summed over tokens

        sigmoid             -log s(beta D)
        hinge               max(0, 1 - beta D)
        cdpo                -(1 - e) log s(beta D) - e log s(-beta D)
        robust              (-(1 - e) log s(beta D) + e log s(-beta D)) / (1 - 2 e)
        ipo                 (D' - 1 / (2 beta))^2
        length-normalized   -log s(beta D')

    In D' each h is divided by the number of the answer's tokens.

    Args:
        chosen, rejected: of the same pairs, with their references.
        beta: strength of the pull to the reference, > 0; 0.1 to 0.5 in the paper, 2 to 10 for
            length-normalized.
        kind: one of KINDS.
        flipped: e, the share of pairs whose labels are taken to be wrong, in [0, 0.5); it counts
            for cdpo and robust alone.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind in ("ipo", "length-normalized"):
        margin = chosen.gain / chosen.tokens - rejected.gain / rejected.tokens
    else:
        margin = chosen.gain - rejected.gain
    if kind in ("sigmoid", "length-normalized"):
        return -F.logsigmoid(beta * margin)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)).square()
    if kind == "hinge":
        return F.relu(1 - beta * margin)
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    if kind == "cdpo":
        return -(1 - flipped) * right - flipped * wrong
    if kind == "robust":
        return (-(1 - flipped) * right + flipped * wrong) / (1 - 2 * flipped)
    raise ValueError(f"dpo: no loss {kind!r}; choose one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class DPO:
    """dpo_loss with the metrics of TRL; `beta`, `kind` and `flipped` as there."""

    beta: float = 0.1
    kind: str = "sigmoid"
    flipped: float = 0.0

    needs_reference: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS

    def __call__(self, chosen: Answers, rejected: Answers) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Each pair's loss and, in the order of `metrics`, its metrics, all [B]."""
        loss = dpo_loss(chosen, rejected, beta=self.beta, kind=self.kind, flipped=self.flipped)
        better, worse = self.beta * chosen.gain, self.beta * rejected.gain
        return loss, pair_metrics(better, worse, chosen.log_prob, rejected.log_prob)
