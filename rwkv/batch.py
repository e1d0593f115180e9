"""What a batch is: data/ makes these, losses/ reads them.

Named tuples, because torch pins their tensors and Lightning moves them; Lightning refuses frozen
dataclasses and torch leaves any dataclass unpinned.
"""

from typing import NamedTuple

from torch import Tensor


def scored_places(mask: Tensor) -> Tensor:
    """Where a mask [B, T] is true, as rising indices into its B * T places, [n], int64.

    Of a mask on a GPU it waits for all work in flight, so batches bring it from the CPU.
    """
    return mask.flatten().nonzero().squeeze(1)


class TokenBatch(NamedTuple):
    """Rows of tokens with the next token of each, all [B, T].

    inputs, targets: token ids, int64; targets[:, t] follows inputs[:, t].
    mask: bool, true where the loss counts the target: answers, not prompts or padding.
    cu_seqlens: for texts packed into B = 1, where each starts, and T, [Q + 1], int64; else None.
    count: scored targets of the whole optimizer step, over all its micro-batches and ranks, an
        int64 scalar (an integer, because trainers cast the floats of a batch). Every loss is a sum
        divided by it, so that no way of cutting a step changes the number.
    places: see `scored_places`.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    places: Tensor | None = None

    def tokens(self) -> int:
        """Input tokens that the model reads, padding included."""
        return self.inputs.numel()

    def columns(self, start: int, stop: int) -> "TokenBatch":
        """The tokens [start, stop) of every row; cu_seqlens is left as it is."""
        inputs, targets, mask = (field[:, start:stop] for field in self[:3])
        return self._replace(inputs=inputs, targets=targets, mask=mask, places=None)

    def scored_places(self) -> Tensor:
        """See the function of this name."""
        return scored_places(self.mask) if self.places is None else self.places


class TeacherBatch(NamedTuple):
    """A TokenBatch with a teacher's scores of the likeliest tokens that may follow each input.

    inputs, targets, mask, cu_seqlens, count: as in TokenBatch.
    ids: the k likeliest tokens, likeliest first, [B, T, k]; the bits of a uint16 as int16.
    values: their logits less one number for each position, [B, T, k]; the number is the
        log-sum-exp over the vocabulary (so that they are log-probabilities) where `lse` is given.
        The bits of a float16 as int16, because trainers cast the floats of a batch.
    lse: log of the sum over the vocabulary of exp(log-probability / temperature), [B, T], at the
        temperature of the run; the bits of a float32 as int32. None where no more than the k
        logits is known.
    places: see `scored_places`.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    ids: Tensor
    values: Tensor
    lse: Tensor | None
    places: Tensor | None = None

    def tokens(self) -> int:
        """Input tokens that the model reads, padding included."""
        return self.inputs.numel()

    def columns(self, start: int, stop: int) -> "TeacherBatch":
        """The tokens [start, stop) of every row; cu_seqlens is left as it is."""
        inputs, targets, mask, ids, values = (
            field[:, start:stop]
            for field in (self.inputs, self.targets, self.mask, self.ids, self.values)
        )
        lse = None if self.lse is None else self.lse[:, start:stop]
        return self._replace(
            inputs=inputs,
            targets=targets,
            mask=mask,
            ids=ids,
            values=values,
            lse=lse,
            places=None,
        )

    def scored_places(self) -> Tensor:
        """See the function of this name."""
        return scored_places(self.mask) if self.places is None else self.places


class PreferenceBatch(NamedTuple):
    """Prompts with their answers: a prompt is read once, each of its answers from its state.

    An answer's first token is scored where its prompt ends; its other tokens are `targets`, each
    after the one before it. Ids and numbers are int64.

    prompts: all prompts end to end, [1, Tp].
    prompt_seqlens: where each prompt starts, and Tp, [P + 1].
    prompt_of: the prompt of each answer, [A].
    first: each answer's first token, [A].
    lengths: each answer's number of tokens, [A].
    inputs, targets: the answers of two tokens and more end to end, each without its last and
        without its first token, [1, Ta].
    answer_seqlens: where each of these starts, and Ta, [L + 1].
    answer_of: which answer each of these is, [L].
    chosen, rejected: the answers that are the better and the worse ones, [B] each, where answers
        come in pairs; of any numbers where they come alone.
    reference: log-probability of each answer under the reference model, summed over its tokens,
        [A]; the bits of a float32 as int32, because trainers cast the floats of a batch. None
        where there are no scores.
    count: of the whole optimizer step, over all its micro-batches and ranks: chosen answers,
        rejected answers, and tokens of the chosen answers, [3].
    """

    prompts: Tensor
    prompt_seqlens: Tensor
    prompt_of: Tensor
    first: Tensor
    lengths: Tensor
    inputs: Tensor
    targets: Tensor
    answer_seqlens: Tensor
    answer_of: Tensor
    chosen: Tensor
    rejected: Tensor
    reference: Tensor | None
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls

    def tokens(self) -> int:
        """Input tokens that the model reads."""
        return self.prompts.numel() + self.inputs.numel()
