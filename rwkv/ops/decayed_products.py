"""Products between the tokens of a chunk, each weighted by the decay between the two.

    products[t, s] = sum_n x[t, n] z[s, n] d[s + 1, n] ... d[t - 1, n]    for s < t, else 0

A matrix product needs the weight as a factor of t times a factor of s. Relative to one point of
the chunk, one of the two grows as exp(|log decay|) and overflows where decay is strong. Here a
chunk is halved again and again: for t in the upper and s in the lower half the weight is (from the
middle to t) times (from s to the middle), both at most 1. The halving ends at blocks so short that
one point serves; a single token in the worst case. No decay overflows or loses digits, and in the
gradient of a token's decay terms of pairs that do not straddle it need not cancel.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SPREAD = 20.0  # log decay that a block may hold: its factors stay within exp(-20) and exp(20)


class _Level(NamedTuple):
    """The pairs between the lower and the upper halves of blocks of 2 size tokens."""

    size: int
    up: Tensor  # weight from the middle to t, [P, blocks, size, N]
    down: Tensor  # weight from s to the middle, [P, blocks, size, N]
    x: Tensor  # weighted x of the upper halves, [P, blocks, I size, N]
    z: Tensor  # weighted z of the lower halves, [P, blocks, J size, N]


class DecayedProducts:
    """The products of a batch of chunks, with what is needed for their gradient.

    Args:
        x: reading vectors, [P, I, C, N], C a power of two.
        z: written vectors, [P, J, C, N].
        log_decay: natural log of what each token keeps, [P, C, N], <= 0, finite.

    Attributes:
        products: as above, [P, I C, J C].
        entry: x weighted by the decay from the chunk's start to before its own token,
            [P, I C, N]: what reads the state at the chunk's start.
        exit: z weighted by the decay after its own token, [P, J C, N]: what is left of it in the
            state at the chunk's end.
        kept: the share of the state that the whole chunk keeps, [P, N].
    """

    def __init__(self, x: Tensor, z: Tensor, log_decay: Tensor):
        P, C, N = log_decay.shape
        self._x, self._z = x, z
        size = _leaf_size(log_decay)
        by_block = log_decay.unflatten(1, (-1, size))
        before = by_block.cumsum(2) - by_block  # from the block's start to before each token
        total = before[:, :, -1] + by_block[:, :, -1]  # [P, blocks, N]
        after = total.unsqueeze(2) - before - by_block  # from each token to the block's end

        self._leaf: _Level | None = None
        self.products = x.new_zeros(P, x.shape[1] * C, z.shape[1] * C)
        if size > 1:
            middle = before[:, :, size // 2].unsqueeze(2)
            up, down = (before - middle).exp_(), (middle - before - by_block).exp_()
            xs, zs = _weighted(_leaves(x, size), up), _weighted(_leaves(z, size), down)
            self._leaf = _Level(size, up, down, xs, zs)
            blocks = (xs @ zs.mT).view(P, -1, x.shape[1], size, z.shape[1], size)
            blocks *= _earlier(size, like=x)
            _leaf_products(self, size).copy_(blocks.permute(0, 2, 3, 4, 5, 1))
