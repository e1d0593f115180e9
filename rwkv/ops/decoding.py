"""What one token of each row needs beside matrix products: few and large steps, states in place.

A backend module offers, for B rows, C channels and H heads of N,

    mix_shift(x, added, norm, shift, mixes) -> list[Tensor]
        x += added where one is given; n = norm(x); for each mix: n + (shift - n) mix; shift = n.
        x, added, shift [B, C]; x and shift are changed in place; mixes are parameters of C numbers;
        a tensor [B, C] for each.
    mix_shift6(x, added, norm, shift, mix) -> (mixed, n, shift - n)
        the same with one mix, and what `mix_apart` goes on from.
    mix_apart(n, before, mixes, deltas) -> list[Tensor]
        n + before (mix + delta) for each; deltas [M, B, C].
    low_rank7(att, x_w, x_a, x_v, x_g) -> (decay, iclr, blend, gate)
        the low-rank products of RWKV-7, [B, H N] each; blend is None in layer 0.
    wkv7_step(att, r, k, v, decay, iclr, blend, gate, v_first, wkv, late) -> Tensor
        RWKV-7's recurrence over one token, from the projections r, k, v and the low-rank products
        of decay, in-context learning rate and value residual (None in layer 0), all [B, H N],
        without their offsets w0, a0, v0; the state wkv [B, H, N, N] is changed in place. What
        `att.output` reads, [B, H N]: normed, with the bonus, times the gate. late: see `Late`.
    wkv6_step(att, r, k, v, decay, gate, wkv, late) -> Tensor
        RWKV-6's, the same way; the gate before its silu.
    square_relu(x) -> Tensor
        relu(x)^2; x may be changed.
    pick(logits, sampling, uniforms, counts, banned) -> Tensor
        rwkv.sampling.pick_tokens, and count_tokens in place.
    uniform_numbers(seed, rows, steps) -> Tensor
        rwkv.sampling.uniform_numbers, to the bit.

    LATE
        the most changes that a `Late` may hold; 0 where it takes none.

Parameters are read from the modules; see TimeMix7.forward and TimeMix6.forward for the formulas.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv.ops.backends import choose_backend

BACKENDS = {"triton": "rwkv.ops.decoding_triton", "torch": "rwkv.ops.decoding_torch"}


def decoding_backend(
    wanted: str, *, N: int, device: torch.device, dtype: torch.dtype
) -> ModuleType:
    """The module that decodes beside a model whose --kernel is `wanted`.

    `torch` and `reference` ask for plain torch; every other word for the best that can run.

    Args:
        wanted: the model's choice of a wkv backend.
        N: channels of a head.
        device, dtype: of the model's parameters.
    """
    sample = torch.empty((), device=device, dtype=dtype).expand(1, 1, 1, N)
    name = "torch" if wanted in ("torch", "reference") else "auto"
    return choose_backend("decoding", BACKENDS, name, sample, False).module


class Late(NamedTuple):
    """Changes of a layer's wkv state that are not in it yet.

    Many rows' states are most of what a step moves, and their changes a fraction of that. So a step
    reads the state, makes it what it should be by the changes noted before, in order, and notes its
    own; when W are noted already it writes the state instead, and they are done with. Whoever steps
    counts: 0, 1 .. W, 0 again.

    inputs: decay, k and in RWKV-7 iclr, as a step was given them, [W, 2 or 3, B, C].
    values: the values with their residual, [W, B, C], float32.
    noted: how many there are, [], int64; the same tensor for all layers.
    """

    inputs: Tensor
    values: Tensor
    noted: Tensor

    @staticmethod
    def of(version: int, most: int, wkv: Tensor, like: Tensor, noted: Tensor) -> "Late":
        """None noted yet: for a state wkv [B, H, N, N] and activations like `like`."""
        B, C = wkv.shape[0], wkv.shape[1] * wkv.shape[2]
        inputs = like.new_zeros(most, 3 if version == 7 else 2, B, C)
        return Late(inputs, wkv.new_zeros(most, B, C), noted)

    def forget(self, rows: Tensor) -> None:
        """Nothing noted changes these rows, whose states are new."""
        self.inputs.index_fill_(2, rows, 0)
        self.inputs[:, 0].index_fill_(1, rows, -torch.inf)  # all is kept
        self.values.index_fill_(1, rows, 0)

    def select(self, rows: Tensor) -> "Late":
        """Of these rows, in this order."""
        return Late(self.inputs[:, :, rows], self.values[:, rows], self.noted)
