"""The state of a model between two calls: all it remembers of the tokens before."""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv.config import RWKVConfig


class LayerState(NamedTuple):
    """One layer's memory of Q sequences; every field keeps its gradient.

    att_shift, ffn_shift: the last token's input to time mix and channel mix, [Q, C].
    wkv: [Q, H, N, N], float32, values on rows, keys on columns.
    """

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor

    def detach(self) -> "LayerState":
        """The same values without history: cuts truncated backpropagation between chunks."""
        return LayerState(*(field.detach() for field in self))

    def last(self, count: int) -> "LayerState":
        """The state of the last sequences alone, in memory of its own."""
        return LayerState(*(field[-count:].clone() for field in self))

    def select(self, index: Tensor) -> "LayerState":
        """The state of the sequences `index`, [K] int64: to repeat, reorder or drop rows."""
        return LayerState(*(field.index_select(0, index) for field in self))


State = list[LayerState]


def zero_state(config: RWKVConfig, Q: int, like: Tensor) -> State:
    """The state of Q new sequences, on the device of `like`; the shifts in its dtype."""
    shift = like.new_zeros(Q, config.n_embd)
    wkv = like.new_zeros(
        Q,
        config.n_head,
        config.head_size,
        config.head_size,
        dtype=torch.promote_types(like.dtype, torch.float32),
    )
    return [LayerState(shift, wkv, shift) for _ in range(config.n_layer)]


def state_tensors(state: State) -> dict[str, Tensor]:
    """The state of one text as a file holds it, float32; `rwkv.runner.load_state` reads it.

    `blocks.N.att.time_state` [H, N, N] and `blocks.N.shift_state` [2, C], the inputs of time mix
    and channel mix. Other programs read the first; the second is left out where all are zeros.
    """
    tensors = {f"blocks.{n}.att.time_state": layer.wkv[0] for n, layer in enumerate(state)}
    shifts = {
        f"blocks.{n}.shift_state": torch.cat([layer.att_shift, layer.ffn_shift])
        for n, layer in enumerate(state)
    }
    if any(bool(shift.any()) for shift in shifts.values()):
        tensors |= shifts
    return {name: tensor.detach().float() for name, tensor in tensors.items()}
