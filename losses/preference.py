"""What the objectives over chosen and rejected answers share: each prompt is read once.

The model reads all prompts, then all answers, each from the state that its prompt left: the same
numbers and gradients as reading prompt and answer twice over, for less than half of the work where
prompts are long.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from losses.logprobs import token_log_probs
from rwkv.batch import PreferenceBatch
from rwkv.chunks import ChunkPlan, read
from rwkv.scattered import most_of_all_ranks

Reference = Callable[[Any], AbstractContextManager[None]]


class Answers(NamedTuple):
    """Some answers, one of each pair.

    log_prob: of each answer given its prompt, summed over its tokens, [B], in nats.
    tokens: of each answer, what ends it included, [B].
    reference: as log_prob, under the reference model; None for losses that need none.
    """

    log_prob: Tensor
    tokens: Tensor
    reference: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Average log-probability of an answer's tokens, [B]."""
        return self.log_prob / self.tokens

    @property
    def gain(self) -> Tensor:
        """log_prob less that of the reference, [B]."""
        if self.reference is None:
            raise ValueError("preference: the answers have no reference; pass their reference")
        return self.log_prob - self.reference


class PairLoss(Protocol):
    """The loss of pairs; losses/dpo.py and its neighbours have them.

    needs_reference: whether the answers must come with reference scores.
    metrics: the names of what a call returns beside the loss.
    """

    @property
    def needs_reference(self) -> bool: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...

    def __call__(self, chosen: Answers, rejected: Answers) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Each pair's loss and metrics, all [B]."""
        ...


PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def pair_metrics(
    better: Tensor, worse: Tensor, chosen: Tensor, rejected: Tensor
) -> tuple[Tensor, ...]:
    """The metrics of pairs under TRL's names, in the order of `PAIR_METRICS`, each [B].

    Args:
        better, worse: rewards of the chosen and the rejected answers, [B].
        chosen, rejected: their log-probabilities, [B], sums or means as the loss takes them.
    """
    return better, worse, accuracy(better, worse), better - worse, chosen, rejected


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen answer has the higher reward, 0.5 at a tie, else 0, [B]."""
    return (chosen > rejected).to(chosen.dtype) + 0.5 * (chosen == rejected).to(chosen.dtype)


def answer_log_probs(model: Any, batch: PreferenceBatch, chunks: ChunkPlan | None = None) -> Tensor:
    """Log-probability of each answer given its prompt, summed over its tokens, [A], in nats.

    This is the one definition that training, reference files and evaluation share.

    Args:
        model: a LanguageModel with `initial_state(Q)`.
        batch: its prompts and answers; what is chosen does not matter here.
        chunks: how long prompts and answers are walked in pieces; None for one piece.
    """
    ends = batch.prompt_seqlens[1:] - 1
    hidden, state = read(model, batch.prompts, batch.prompt_seqlens, None, chunks, keep=ends)
    total = token_log_probs(model, hidden[batch.prompt_of], batch.first)
    longer = int(batch.inputs.numel() > 0)
    if not most_of_all_ranks(longer, model, total.device):
        return total
    if not longer:  # a token that does not count runs along with other ranks' answers
        token, device = batch.first[None, :1], total.device
        batch = batch._replace(
            inputs=token,
            targets=token,
            answer_seqlens=torch.arange(2, device=device),
            answer_of=torch.zeros(1, dtype=torch.int64, device=device),
        )
    begin = batch.prompt_of[batch.answer_of]
    state = [layer.select(begin) for layer in state]  # those that the prompts left are free
    hidden, _ = read(model, batch.inputs, batch.answer_seqlens, state, chunks, final_states=False)
    rest = token_log_probs(model, hidden, batch.targets[0])
    sums = torch.segment_reduce(rest, "sum", lengths=batch.answer_seqlens.diff())
    return total.index_add(0, batch.answer_of, sums, alpha=longer)


def reference_log_probs(
    model: Any, batch: PreferenceBatch, chunks: ChunkPlan | None, reference: Reference | None
) -> Tensor:
    """As answer_log_probs, under the reference model, [A], without gradient.

    Args:
        reference: `reference(model)` is a context within which the model is its own reference;
            None to take the batch's scores.

    Raises:
        ValueError: there is neither.
    """
    if reference is not None:
        with torch.no_grad(), reference(model):
            return answer_log_probs(model, batch, chunks)
    if batch.reference is None:
        raise ValueError(
            "preference: the data has no reference scores; python -m data.make_reference adds them"
        )
    return batch.reference.view(torch.float32)


@dataclass(frozen=True)
class Preference:
    """A loss of pairs + nll_weight * cross-entropy of the chosen answers.

    The first is a mean over the pairs of the optimizer step, the second over the tokens of their
    chosen answers.

    loss: of each pair.
    nll_weight: of the cross-entropy, 0 for none.
    chunks: how long texts are walked in pieces; None for one piece.
    reference: see reference_log_probs.
    """

    loss: PairLoss
    nll_weight: float = 0.0
    chunks: ChunkPlan | None = None
    reference: Reference | None = None

    def __call__(self, model: Any, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch and metrics; both add up over the step's micro-batches."""
        losses, metrics, nll = self._pairs(model, batch)
        pairs, _, tokens = batch.count.clamp_min(1)
        mean_nll = nll / tokens
        numbers = {
            name: value.detach().sum() / pairs
            for name, value in zip(self.loss.metrics, metrics, strict=True)
        }
        loss = losses.sum() / pairs + self.nll_weight * mean_nll
        return loss, {**numbers, "nll": mean_nll.detach()}

    def measure(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """Sums over a held-out batch: pairs, chosen tokens, loss, nll, metrics; float64."""
        with torch.no_grad():
            losses, metrics, nll = self._pairs(model, batch)
            counts = losses.new_tensor([len(losses)]), batch.lengths[batch.chosen].sum()
            parts = [*counts, losses.sum(), nll, *(metric.sum() for metric in metrics)]
            return torch.stack([part.double().reshape(()) for part in parts])

    def summarize(self, total: list[float]) -> dict[str, float]:
        """From added-up measures to means; `loss` has the cross-entropy in its weight."""
        pairs, tokens, losses, nll, *metrics = total
        pairs, tokens = max(pairs, 1), max(tokens, 1)
        means = {name: x / pairs for name, x in zip(self.loss.metrics, metrics, strict=True)}
        loss = losses / pairs + self.nll_weight * nll / tokens
        return {"loss": loss, **means, "nll": nll / tokens}

    def _pairs(
        self, model: Any, batch: PreferenceBatch
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Each pair's loss and metrics [B], and the chosen answers' summed cross-entropy."""
        reference = None
        if self.loss.needs_reference:  # first, while the policy's activations do not exist yet
            reference = reference_log_probs(model, batch, self.chunks, self.reference)
        scores = answer_log_probs(model, batch, self.chunks)
        chosen, rejected = (
            Answers(
                scores[index],
                batch.lengths[index],
                None if reference is None else reference[index],
            )
            for index in (batch.chosen, batch.rejected)
        )
        losses, metrics = self.loss(chosen, rejected)
        return losses, metrics, -chosen.log_prob.sum()
