"""Pick tokens from logits. Pure functions over B rows; V tokens in the vocabulary.

A draw depends on the seed, the row's own number and how many tokens it has written, and on nothing
else: neither on the rows beside it nor on the device. So a text is the same however it is batched.
"""

import torch
from torch import Tensor

from rwkv.sampling_flags import Sampling

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants, as signed numbers
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_BITS = 48  # of a draw; fewer than float64 holds, so that it never rounds up to 1


def pick_tokens(
    logits: Tensor,
    sampling: Sampling,
    uniforms: Tensor,
    *,
    counts: Tensor | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """The next token of each row.

    Args:
        logits: [B, V], any float dtype; computed in float32.
        sampling: temperature, then top_k, then top_p filter what is drawn from; see Sampling.
        uniforms: each row's random number in [0, 1), [B], float64; see `uniform_numbers`.
        counts: how often each token was written before, [B, V], float32, as `count_tokens` keeps
            them; None without penalties.
        banned: true for ids that are never picked, [V], bool.

    Returns:
        [B], int64.
    """
    logits = logits.float()
    if counts is not None:
        logits = penalize(logits, counts, sampling)
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return draw(filtered_probabilities(logits, sampling), uniforms)


def penalize(logits: Tensor, counts: Tensor, sampling: Sampling) -> Tensor:
    """logits - presence_penalty [counts > 0] - frequency_penalty counts, all [B, V]."""
    present = (counts > 0).to(logits.dtype)
    return logits - sampling.presence_penalty * present - sampling.frequency_penalty * counts


def count_tokens(counts: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """The counts [B, V] after `tokens` [B]: the older fade by penalty_decay, then one is added."""
    one = counts.new_ones(len(tokens), 1)
    return (counts * sampling.penalty_decay).scatter_add(1, tokens.unsqueeze(1), one)


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from, [B, V]: zero for tokens that a filter leaves out; rows need no sum of 1.

    A filter keeps one token at least, and all that tie with its last.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        last = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered = probabilities.sort(dim=-1, descending=True).values
        enough = ordered.cumsum(dim=-1) - ordered >= sampling.top_p  # without this token already
        enough[:, 0] = False
        last = ordered.masked_fill(enough, torch.inf).amin(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < last, 0.0)
    return probabilities


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One index a row with the chance of its weight: weights [B, V] >= 0, uniforms [B], [B] out."""
    below = weights.double().cumsum(dim=-1)
    targets = uniforms.to(below).unsqueeze(1) * below[:, -1:]
    return torch.searchsorted(below, targets, right=True).squeeze(1)


def uniform_numbers(seed: int, rows: Tensor, steps: Tensor) -> Tensor:
    """Random numbers in [0, 1) that depend on nothing but the arguments.

    Args:
        seed: any integer.
        rows, steps: which text and which of its tokens, [B], int64.

    Returns:
        [B], float64, on the device of `rows`.

    Source: SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014.
    """
    x = _mix(torch.full_like(rows, (seed + 2**63) % 2**64 - 2**63))
    x = _mix(x + rows * _GOLDEN)
    x = _mix(x + steps * _GOLDEN)
    return _shifted(x, 64 - _BITS).double() / 2**_BITS


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x moved right without copying its sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
