"""Distillation: a student learns the distribution of a teacher's next tokens.

The divergences are functions of log-probabilities over the last dimension, in nats. The teacher's
come from a file of its k likeliest tokens (`python -m data.make_teacher`) or from a teacher that
runs beside the student.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.logprobs import (
    FewScores,
    TokenScores,
    at_places,
    score_few,
    score_logits,
    sum_over_tokens,
)
from losses.sft import l2wrap, smoothed_nll
from rwkv.batch import TeacherBatch, TokenBatch
from rwkv.chunks import ChunkPlan, walk
from rwkv.state import State

RENORMALIZED = ("renormalized", "teacher_renormalized")  # kinds that need no log-sum-exp
LARGEST_SUM = -1e-7  # log of the k tokens' probability; above it the rest is lost in float32


def with_tail(log_probs: Tensor) -> Tensor:
    """Append the log of 1 - sum of p: one bucket for all tokens beside the k, [..., k + 1].

    A divergence over these k + 1 outcomes is at most that over the vocabulary, and grows with k.
    """
    inside = torch.logsumexp(log_probs, dim=-1, keepdim=True).clamp_max(LARGEST_SUM)
    return torch.cat([log_probs, torch.log(-torch.expm1(inside))], dim=-1)


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) = sum p (log p - log q), [...].

    Args:
        teacher, student: log-probabilities log p and log q, [..., k].
    """
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(student || teacher) = sum q (log q - log p), [...]; arguments as in `forward_kl`."""
    return forward_kl(student, teacher)


def generalized_jsd(teacher: Tensor, student: Tensor, *, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, [...].

    Args:
        teacher, student: log p and log q, [..., k].
        beta: in [0, 1]; at the ends it is the forward KL (0) and the reverse KL (1), to which the
            divergence, divided by beta or by 1 - beta, tends.

    Source: Agarwal et al., "On-policy distillation of language models", arXiv:2306.13649, eq. 1.
    """
    if beta == 0:
        return forward_kl(teacher, student)
    if beta == 1:
        return reverse_kl(teacher, student)
    middle = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * forward_kl(teacher, middle) + (1 - beta) * forward_kl(student, middle)


def renormalized_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Forward KL between the softmaxes over the k tokens alone, [...].

    Blind to what the student gives to other tokens. RWKV-LM-RLHF trains with it.

    Args:
        teacher, student: logits divided by the temperature, [..., k].
    """
    return forward_kl(F.log_softmax(teacher, dim=-1), F.log_softmax(student, dim=-1))


def teacher_renormalized_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Forward KL with the teacher's probabilities scaled up to sum to 1 over the k tokens, [...].

    It pulls all of the student's probability into the k tokens.

    Args:
        teacher: logits divided by the temperature, [..., k].
        student: log-probabilities over the vocabulary, of the k tokens, [..., k].
    """
    return forward_kl(F.log_softmax(teacher, dim=-1), student)


@dataclass(frozen=True)
class Divergence:
    """How far the student is from the teacher at one position.

    kind: forward, reverse or jsd; or, of the k tokens alone, renormalized or teacher_renormalized.
    temperature: that divides the logits of both.
    beta: of jsd.
    """

    kind: str = "forward"
    temperature: float = 2.0
    beta: float = 0.5

    @property
    def scale(self) -> float:
        """What multiplies the divergence: T^2 keeps a KL's gradient from shrinking with T.

        Source: Hinton, Vinyals and Dean, arXiv:1503.02531, section 2.
        """
        return self.temperature**2 if self.kind in ("forward", "reverse", "renormalized") else 1.0

    def over(self, teacher: Tensor, student: Tensor) -> Tensor:
        """From log-probabilities at the temperature, over the vocabulary or k + 1, [n, ...]."""
        if self.kind == "jsd":
            return generalized_jsd(teacher, student, beta=self.beta)
        divergence = forward_kl if self.kind == "forward" else reverse_kl
        return self.scale * divergence(teacher, student)

    def of_top_k(self, student: FewScores, values: Tensor, lse: Tensor | None) -> Tensor:
        """The divergence at n positions, [n].

        Args:
            student: the student's scores of the teacher's k likeliest tokens, at the temperature.
            values, lse: as in TeacherBatch, [n, k] and [n], floats; `lse` None for the
                renormalized kinds, which do not need it.
        """
        logits, teacher = student.logits / self.temperature, values / self.temperature
        if self.kind == "renormalized":
            return self.scale * renormalized_kl(teacher, logits)
        log_probs = logits - student.tempered.unsqueeze(-1)
        if self.kind == "teacher_renormalized":
            return teacher_renormalized_kl(teacher, log_probs)
        assert lse is not None
        return self.over(with_tail(teacher - lse.unsqueeze(-1)), with_tail(log_probs))

    def of_logits(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The divergence over the vocabulary at n positions, [n], from the logits [n, V]."""
        return self.over(
            F.log_softmax(teacher / self.temperature, dim=-1),
            F.log_softmax(student / self.temperature, dim=-1),
        )


class Both:
    """A student and its teacher as one model for `rwkv.chunks.walk`: hidden states in pairs."""

    def __init__(self, student: Any, teacher: Any):
        self.student, self.teacher = student, teacher
        self._layers = student.config.n_layer

    def __call__(
        self,
        tokens: Tensor,
        state: State | None,
        cu_seqlens: Tensor | None,
        *,
        final_states: int | None = None,
    ) -> tuple[tuple[Tensor, Tensor], State]:
        before = (None, None) if state is None else (state[: self._layers], state[self._layers :])
        wanted: dict[str, Any] = {"final_states": final_states}
        hidden, after = self.student(tokens, before[0], cu_seqlens, **wanted)
        with torch.no_grad():
            taught, beyond = self.teacher(tokens, before[1], cu_seqlens, **wanted)
        return (hidden, taught), after + beyond

    def initial_state(self, Q: int) -> State:
        return self.student.initial_state(Q) + self.teacher.initial_state(Q)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What may train: the student's."""
        return self.student.parameters()


@dataclass(frozen=True)
class Distillation:
    """alpha * cross-entropy of the scored tokens + (1 - alpha) * divergence from the teacher there.

    Both are divided by the count of the whole optimizer step.

    divergence: which, and at what temperature.
    alpha: weight of the hard labels, in [0, 1].
    smoothing, l2wrap: of the hard labels, as in SFT.
    teacher: an RWKV with the student's vocabulary that reads every batch; None where the batches
        bring a teacher's scores.
    chunks: how a long batch is walked in pieces; None for one piece. A `teacher` reads each piece
        twice then, for it is recomputed like the student.
    """

    divergence: Divergence
    alpha: float = 0.5
    smoothing: float = 0.0
    l2wrap: float = 1e-4
    teacher: Any = None
    chunks: ChunkPlan | None = None

    def __call__(
        self, model: Any, batch: TokenBatch | TeacherBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch and metrics; both add up over the step's micro-batches."""

        def sums(scores: TokenScores, divergence: Tensor) -> Tensor:
            nll = -scores.log_prob.detach().sum()
            hard = smoothed_nll(scores, self.smoothing).sum() + l2wrap(scores, self.l2wrap)
            far = divergence.sum()
            loss = self.alpha * hard + (1 - self.alpha) * far
            return torch.stack([loss, nll, far.detach(), scores.hit.sum()])

        total = self._walk(model, batch, sums) / batch.count.clamp_min(1)
        loss, nll, far, hits = total
        metrics = {"nll": nll, "kl": far, "accuracy": hits}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def measure(self, model: Any, batch: TokenBatch | TeacherBatch) -> Tensor:
        """(summed nll, divergence, correct and scored tokens) of a held-out batch, [4], float64."""

        def sums(scores: TokenScores, divergence: Tensor) -> Tensor:
            count = torch.full_like(scores.hit, 1.0).sum()
            return torch.stack([-scores.log_prob.sum(), divergence.sum(), scores.hit.sum(), count])

        with torch.no_grad():
            return self._walk(model, batch, sums).double()

    def summarize(self, total: list[float]) -> dict[str, float]:
        """From added-up measures: the mixed loss without smoothing a token, its parts, accuracy."""
        nll, far, correct, scored = (*total[:3], max(total[3], 1.0))
        return {
            "loss": (self.alpha * nll + (1 - self.alpha) * far) / scored,
            "nll": nll / scored,
            "kl": far / scored,
            "perplexity": math.exp(min(nll / scored, 700.0)),
            "accuracy": correct / scored,
        }

    def _walk(
        self,
        model: Any,
        batch: TokenBatch | TeacherBatch,
        sums: Callable[[TokenScores, Tensor], Tensor],
    ) -> Tensor:
        """What `sums` makes of the scores and divergences of the scored tokens, added up."""

        def of_top_k(
            logits: Tensor, targets: Tensor, ids: Tensor, values: Tensor, *lse: Tensor
        ) -> Tensor:
            scores, few = score_few(
                logits, targets, ids, self.divergence.temperature, given_up=True
            )
            return sums(scores, self.divergence.of_top_k(few, values, lse[0] if lse else None))

        def from_file(hidden: Tensor, piece: TeacherBatch) -> Tensor:
            places = piece.scored_places()
            given = (at_places(piece.targets, places), *teacher_scores(piece, places))
            return sum_over_tokens(model, at_places(hidden, places), given, of_top_k)

        def of_logits(logits: Tensor, targets: Tensor, taught: Tensor) -> Tensor:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            with torch.no_grad():
                teacher = self.teacher.logits(taught).to(wide)
            return sums(score_logits(wide, targets), self.divergence.of_logits(teacher, wide))

        def from_teacher(hidden: tuple[Tensor, Tensor], piece: TokenBatch) -> Tensor:
            places = piece.scored_places()
            student, taught, targets = (at_places(x, places) for x in (*hidden, piece.targets))
            return sum_over_tokens(model, student, (targets, taught), of_logits, copies=True)

        if isinstance(batch, TeacherBatch):
            return walk(model, batch, from_file, self.chunks)
        self.teacher.to(batch.inputs.device)
        return walk(Both(model, self.teacher), batch, from_teacher, self.chunks)


def teacher_scores(batch: TeacherBatch, places: Tensor) -> tuple[Tensor, ...]:
    """The teacher's scores at the batch's scored tokens: ids, values [n, k] and, if known, lse [n].

    The ids are int64, the rest float32.
    """
    ids = at_places(batch.ids, places).long() & 0xFFFF
    values = at_places(batch.values, places).view(torch.float16).float()
    if batch.lse is None:
        return ids, values
    return ids, values, at_places(batch.lse, places).view(torch.float32)
