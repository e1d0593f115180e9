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
    wkv7_step(att, r, k, v, decay, iclr, blend, gate, v_first, wkv) -> Tensor
        RWKV-7's recurrence over one token, from the projections r, k, v and the low-rank products
        of decay, in-context learning rate and value residual (None in layer 0), all [B, H N],
        without their offsets w0, a0, v0; the state wkv [B, H, N, N] is changed in place. What
        `att.output` reads, [B, H N]: normed, with the bonus, times the gate.
    wkv6_step(att, r, k, v, decay, gate, wkv) -> Tensor
        RWKV-6's, the same way; the gate before its silu.
    square_relu(x) -> Tensor
        relu(x)^2; x may be changed.
    pick(logits, sampling, uniforms, counts, banned) -> Tensor
        rwkv.sampling.pick_tokens, and count_tokens in place.
    uniform_numbers(seed, rows, steps) -> Tensor
        rwkv.sampling.uniform_numbers, to the bit.

Parameters are read from the modules; see TimeMix7.forward and TimeMix6.forward for the formulas.
"""

from types import ModuleType

import torch

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
