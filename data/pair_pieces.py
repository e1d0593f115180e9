"""Which preference records are trained, and batches made of them.

A record is never cut: without its end an answer says something else, and scores that were made of
the whole do not fit a part. One whose prompt and longest answer take more than ctx_len tokens is
left out and counted. A row has room for 2 * ctx_len tokens, so that the longest pair fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from data.pair_store import PairStore
from rwkv.batch import PreferenceBatch
from rwkv.errors import InputError

NOTHING = np.zeros(1, np.int64)  # stands for a prompt and an answer where a rank has no record


class Pair(NamedTuple):
    """Token ids of a prompt and its answers; an answer that is missing is empty.

    reference: the two answers' log-probabilities under the reference model, in nats.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    reference: tuple[float, float] | None = None


@dataclass(frozen=True)
class PairPieces:
    """Records of a store that fit.

    store: where the tokens are.
    record: their numbers, int64.
    sizes: tokens that the model reads of each, the room it takes in a row.
    scored: of each, chosen answers, rejected answers, tokens of the chosen answer, [K, 3].
    room: of a row.
    report: how many records were left out, and why.
    """

    store: PairStore
    record: np.ndarray
    sizes: np.ndarray
    scored: np.ndarray
    room: int
    report: dict[str, int]

    @property
    def prompt_share(self) -> float:
        """The share of all tokens that are prompts'."""
        return self.report["prompt tokens"] / int(self.sizes.sum())

    @property
    def most_answers(self) -> int:
        """The answers of the record that has most of them."""
        return int(self.scored[:, :2].sum(axis=1).max())

    def batch(
        self, rows: Sequence[np.ndarray], count: Sequence[int], *, packed: bool
    ) -> PreferenceBatch:
        """A batch of the given records, all end to end.

        Args:
            rows: the numbers of the records in each row.
            count: see PreferenceBatch.
            packed: whether rows may hold several records; they lie end to end either way.
        """
        numbers = [int(self.record[n]) for row in rows for n in row]
        return make_batch([self.store.pair(number) for number in numbers], count)


def cut_pairs(store: PairStore, ctx_len: int, overlong: str = "auto") -> PairPieces:
    """The records of a store that fit into ctx_len.

    Args:
        store: the records.
        ctx_len: tokens that a prompt and one answer may have together, at least 2.
        overlong: "auto" or "drop".

    Raises:
        InputError: `overlong` is another word, or nothing is left to train.
    """
    if ctx_len < 2:
        raise InputError(
            f"--ctx_len {ctx_len}: a prompt and an answer need 2 tokens at least; raise it"
        )
    if overlong not in ("auto", "drop"):
        raise InputError(
            f"--overlong {overlong}: answers are compared whole; use drop, or raise --ctx_len"
        )
    prompts, chosen, rejected = (store.by_record[name] for name in ("prompt", "chosen", "rejected"))
    limit = min(ctx_len, store.longest or ctx_len)
    fits = prompts + np.maximum(chosen, rejected) <= limit
    record = np.flatnonzero(fits)
    if not len(record):
        shortest = int((prompts + np.maximum(chosen, rejected)).min())
        name = "ctx_len" if limit == ctx_len else "rlhf_max_corpus_len"
        raise InputError(
            f"--{name} {limit}: no prompt with its longer answer fits, the shortest has "
            f"{shortest} tokens; raise --{name}"
        )
    has = np.stack([chosen > 0, rejected > 0, chosen], axis=1).astype(np.int64)[record]
    sizes = (prompts + np.maximum(chosen - 1, 0) + np.maximum(rejected - 1, 0))[record]
    report = {
        "records": len(store),
        "pairs": int((has[:, 0] * has[:, 1]).sum()),
        "single answers": int((has[:, 0] ^ has[:, 1]).sum()),
        "left out, prompt longer than the room": int((prompts >= limit).sum()),
        "left out, prompt and answer longer than the room": int((~fits & (prompts < limit)).sum()),
        "prompt tokens": int(prompts[record].sum()),
        "answer tokens": int((chosen + rejected)[record].sum()),
    }
    return PairPieces(store, record, sizes, has, 2 * ctx_len, report)


def make_batch(pairs: Sequence[Pair], count: Sequence[int] | None = None) -> PreferenceBatch:
    """Pairs as a batch; none at all give one answer of one token that nothing counts.

    Args:
        pairs: with a token in each prompt and in one answer at least; all with reference scores
            or none.
        count: see PreferenceBatch; None to count the pairs given.
    """
    answers: list[np.ndarray] = []
    prompt_of: list[int] = []
    scores: list[float] = []
    sides: tuple[list[int], list[int]] = ([], [])
    for number, pair in enumerate(pairs):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            if len(answer):
                sides[side].append(len(answers))
                answers.append(answer)
                prompt_of.append(number)
                scores.append(pair.reference[side] if pair.reference else 0.0)
    if count is None:
        tokens = sum(len(pair.chosen) for pair in pairs)
        count = len(sides[0]), len(sides[1]), tokens
    prompts = [pair.prompt for pair in pairs] or [NOTHING]
    if not pairs:
        answers, prompt_of, scores = [NOTHING], [0], [0.0]
    long = [number for number, answer in enumerate(answers) if len(answer) > 1]
    referenced = not pairs or pairs[0].reference is not None
    return PreferenceBatch(
        prompts=_row(prompts),
        prompt_seqlens=_seqlens([len(prompt) for prompt in prompts]),
        prompt_of=torch.tensor(prompt_of),
        first=torch.tensor([int(answer[0]) for answer in answers]),
        lengths=torch.tensor([len(answer) for answer in answers]),
        inputs=_row([answers[number][:-1] for number in long]),
        targets=_row([answers[number][1:] for number in long]),
        answer_seqlens=_seqlens([len(answers[number]) - 1 for number in long]),
        answer_of=torch.tensor(long, dtype=torch.long),
        chosen=torch.tensor(sides[0], dtype=torch.long),
        rejected=torch.tensor(sides[1], dtype=torch.long),
        reference=torch.tensor(scores, dtype=torch.float32).view(torch.int32)
        if referenced
        else None,
        count=torch.tensor(count),
    )


def _row(texts: Sequence[np.ndarray]) -> torch.Tensor:
    joined = np.concatenate(texts) if texts else np.zeros(0)
    return torch.from_numpy(joined.astype(np.int64))[None]


def _seqlens(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
