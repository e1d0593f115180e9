"""From the projections of RWKV-7's time mix to what wkv7 reads.

    w = -softplus(-(w0 + decay)) - 0.5        iclr = sigmoid(a0 + iclr)
    v' = v + (v_first - v) sigmoid(v0 + value)
    kk = k k_k / |k k_k|                      a head's
    k' = k (1 + (iclr - 1) k_a)
    a = -kk,  b = kk iclr,  bonus = sum over a head of r k' r_k

Source: RWKV-7 "Goose", arXiv:2503.14456.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv.ops import fused
from rwkv.ops.head_output import fits_kernels


class Wkv7Inputs(NamedTuple):
    """What wkv7 reads, [B, T, H, N], and what comes after it.

    bonus: what the current token adds to its own output, a factor of v, [B, T, H].
    v_again: v once more, for that product: its gradient then needs no pass of its own.
    v_first: the first layer's values, [B, T, C], for the layers to come.
    """

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    bonus: Tensor
    v_again: Tensor
    v_first: Tensor


def wkv7_inputs(
    *,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    v_first: Tensor | None,
    decay: Tensor,
    iclr: Tensor,
    value: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
) -> Wkv7Inputs:
    """Prepare the operator's inputs.

    The kernel keeps r, k, v, v_first, decay, iclr and value for the backward pass: 14 bytes a token
    and channel in bfloat16, of which wkv7 and other layers keep r and v_first anyway.

    Args:
        r, k, v: the projections, [B, T, C].
        v_first: the first layer's values; None in the first layer, whose v they are.
        decay, iclr, value: the low-rank products, before their biases; `value` None in layer 0.
        w0, a0, v0, k_k, k_a: parameters of C channels; `v0` None in layer 0.
        r_k: [H, N].
    """
    N = r_k.shape[1]
    parameters = [p for p in (w0, a0, v0, k_k, k_a, r_k) if p is not None]
    if fits_kernels(N) and fused.uses_kernels(k, *parameters):
        from rwkv.ops.wkv7_inputs_triton import wkv7_inputs as run

        return Wkv7Inputs(*run(r, k, v, v_first, decay, iclr, value, w0, a0, v0, k_k, k_a, r_k))
    decay = w0 + decay
    w = -F.softplus(-decay.to(torch.promote_types(decay.dtype, torch.float32))) - 0.5
    iclr = torch.sigmoid(a0 + iclr)
    if v_first is None:
        v_first = v
    else:
        assert value is not None and v0 is not None
        v = torch.lerp(v, v_first, torch.sigmoid(v0 + value))
    kk = F.normalize((k * k_k).unflatten(-1, (-1, N)), dim=-1)
    k = k * torch.addcmul(torch.ones_like(k_a), iclr - 1, k_a)
    r, w, k, v, iclr = (t.unflatten(-1, (-1, N)) for t in (r, w, k, v, iclr))
    bonus = (r * k * r_k).sum(dim=-1)
    return Wkv7Inputs(r, w.to(v.dtype), k, v, -kk, kk * iclr, bonus, v, v_first)
