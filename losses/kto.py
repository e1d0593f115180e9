"""Kahneman-Tversky optimization: answers that are good or bad, alone or in pairs.

Source: arXiv:2402.01306, eq. 7 and 8.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.preference import Reference, answer_log_probs, reference_log_probs
from rwkv.batch import PreferenceBatch
from rwkv.chunks import ChunkPlan


def kto_loss(gain: Tensor, desirable: Tensor, baseline: Tensor, *, beta: float) -> Tensor:
    """1 - s(beta (h - z)) of each desirable answer, 1 - s(beta (z - h)) of each other one, [A].

    Args:
        gain: h, log-probability of each answer under the policy less that under the reference,
            summed over its tokens, [A], in nats.
        desirable: which answers are good, [A], bool.
        baseline: z, estimate of the divergence from the reference, a scalar, >= 0, without
            gradient.
        beta: strength of the pull to the reference, > 0; 0.1 in the paper.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(gain.dtype)
    return 1 - torch.sigmoid(beta * sign * (gain - baseline))


def mismatched(batch: PreferenceBatch) -> PreferenceBatch:
    """The same prompts and answers, each answer after the prompt of the next."""
    return batch._replace(prompt_of=(batch.prompt_of + 1) % (len(batch.prompt_seqlens) - 1))


@dataclass(frozen=True)
class KTO:
    """kto_loss, weighted and averaged over the answers of the optimizer step.

    The baseline z is max(0, mean gain) of a micro-batch's answers after prompts that are not
    theirs; it is 0 where the micro-batch has one prompt only.

    beta: as in kto_loss.
    desirable, undesirable: weights of the good and of the bad answers; such that their ratio
        times that of the numbers of answers is in 1 to 4/3, as the paper advises.
    nll_weight: of the good answers' cross-entropy, 0 for none.
    chunks, reference: as in Preference.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    nll_weight: float = 0.0
    chunks: ChunkPlan | None = None
    reference: Reference | None = None

    def __call__(self, model: Any, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch and metrics; both add up over the step's micro-batches."""
        good, bad, tokens = batch.count.clamp_min(1)
        losses, rewards, nll, baseline = self._answers(model, batch)
        mean_nll = nll / tokens
        loss = losses.sum() / batch.count[:2].sum().clamp_min(1) + self.nll_weight * mean_nll
        chosen = rewards[batch.chosen].sum() / good
        rejected = rewards[batch.rejected].sum() / bad
        here = len(batch.chosen) + len(batch.rejected)
        return loss, {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "kl": baseline * (here / batch.count[:2].sum().clamp_min(1)),
            "nll": mean_nll.detach(),
        }

    def measure(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """Sums over a held-out batch, [8], float64: good and bad answers, chosen tokens, loss,
        their rewards, cross-entropy, and the baseline times the answers."""
        with torch.no_grad():
            losses, rewards, nll, baseline = self._answers(model, batch)
            good, bad = len(batch.chosen), len(batch.rejected)
            parts = [
                losses.new_tensor(good),
                losses.new_tensor(bad),
                batch.lengths[batch.chosen].sum(),
                losses.sum(),
                rewards[batch.chosen].sum(),
                rewards[batch.rejected].sum(),
                nll,
                baseline * (good + bad),
            ]
            return torch.stack([part.double() for part in parts])

    def summarize(self, total: list[float]) -> dict[str, float]:
        """From added-up measures to means; `loss` has the cross-entropy in its weight."""
        good, bad, tokens, losses, chosen, rejected, nll, baseline = total
        answers, tokens = max(good + bad, 1), max(tokens, 1)
        chosen, rejected = chosen / max(good, 1), rejected / max(bad, 1)
        return {
            "loss": losses / answers + self.nll_weight * nll / tokens,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "kl": baseline / answers,
            "nll": nll / tokens,
        }

    def _answers(self, model: Any, batch: PreferenceBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted losses and rewards of the answers, summed cross-entropy, and the baseline."""
        reference = reference_log_probs(model, batch, self.chunks, self.reference)
        baseline = self._baseline(model, batch)
        scores = answer_log_probs(model, batch, self.chunks)
        gain = scores - reference
        desirable = torch.zeros_like(batch.lengths, dtype=torch.bool)
        desirable[batch.chosen] = True
        counted = desirable.clone()
        counted[batch.rejected] = True
        weights = torch.where(desirable, self.desirable, self.undesirable) * counted
        losses = weights * kto_loss(gain, desirable, baseline, beta=self.beta)
        return losses, self.beta * gain.detach(), -scores[batch.chosen].sum(), baseline

    def _baseline(self, model: Any, batch: PreferenceBatch) -> Tensor:
        if len(batch.prompt_seqlens) <= 2:
            return torch.zeros((), device=batch.prompts.device)
        if self.reference is None:
            raise ValueError("kto: stored scores have no mismatched answers; pass `reference`")
        other = mismatched(batch)
        with torch.no_grad():
            policy = answer_log_probs(model, other, self.chunks)
            reference = reference_log_probs(model, other, self.chunks, self.reference)
            return (policy - reference).mean().clamp_min(0)
