"""One token of each row in plain torch; see rwkv/ops/decoding.py."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv.ops.decoding import Late
from rwkv.sampling import count_tokens, pick_tokens
from rwkv.sampling import uniform_numbers as uniform_numbers  # a function that a backend offers
from rwkv.sampling_flags import Sampling

LATE = 0  # a state is written at every step
BEYOND = 80.0  # from here on exp(-exp(w)) is 0, also where exp(w) overflows


def why_not(sample: Tensor, packed: bool) -> str | None:
    return None


def mix_shift(
    x: Tensor, added: Tensor | None, norm: nn.LayerNorm, shift: Tensor, mixes: list[Tensor]
) -> list[Tensor]:
    normed, before = _norm_shift(x, added, norm, shift)
    return [torch.addcmul(normed, before, mix.view(-1)) for mix in mixes]


def mix_shift6(
    x: Tensor, added: Tensor | None, norm: nn.LayerNorm, shift: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    normed, before = _norm_shift(x, added, norm, shift)
    return torch.addcmul(normed, before, mix.view(-1)), normed, before


def mix_apart(n: Tensor, before: Tensor, mixes: list[Tensor], deltas: Tensor) -> list[Tensor]:
    pairs = zip(mixes, deltas, strict=True)
    return [torch.addcmul(n, before, mix.view(-1) + delta) for mix, delta in pairs]


def low_rank7(
    att: nn.Module, x_w: Tensor, x_a: Tensor, x_v: Tensor, x_g: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    q = dict(att.named_parameters(recurse=False))
    return (
        torch.tanh(x_w @ q["w1"]) @ q["w2"],
        x_a @ q["a1"] @ q["a2"],
        x_v @ q["v1"] @ q["v2"] if "v1" in q else None,
        torch.sigmoid(x_g @ q["g1"]) @ q["g2"],
    )


def wkv7_step(
    att: nn.Module,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    iclr: Tensor,
    blend: Tensor | None,
    gate: Tensor,
    v_first: Tensor | None,
    wkv: Tensor,
    late: Late | None,
) -> Tensor:
    assert late is None
    B, H, N, _ = wkv.shape

    def heads(x: Tensor) -> Tensor:
        return x.to(wkv.dtype).view(-1, H, N)

    q = {n: heads(p) for n, p in att.named_parameters(recurse=False) if p.numel() == H * N}
    r, k, v = heads(r), heads(k), heads(v)
    kept = torch.exp(-math.exp(-0.5) * torch.sigmoid(q["w0"] + heads(decay)))
    iclr = torch.sigmoid(q["a0"] + heads(iclr))
    if blend is not None:
        assert v_first is not None
        v = torch.lerp(v, heads(v_first), torch.sigmoid(q["v0"] + heads(blend)))
    kk = F.normalize(k * q["k_k"], dim=-1)
    k = k * (1 + (iclr - 1) * q["k_a"])
    removed = wkv @ kk.unsqueeze(-1)
    wkv.mul_(kept.unsqueeze(-2))
    wkv.sub_(removed @ (kk * iclr).unsqueeze(-2)).add_(v.unsqueeze(-1) @ k.unsqueeze(-2))
    y = (wkv @ r.unsqueeze(-1)).squeeze(-1)
    bonus = (r * k * q["r_k"]).sum(dim=-1, keepdim=True) * v
    return ((_norm_heads(att, y) + bonus.flatten(1)) * gate).to(gate.dtype)


def wkv6_step(
    att: nn.Module,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    gate: Tensor,
    wkv: Tensor,
    late: Late | None,
) -> Tensor:
    assert late is None
    B, H, N, _ = wkv.shape

    def heads(x: Tensor) -> Tensor:
        return x.to(wkv.dtype).view(-1, H, N)

    r, k, v = heads(r), heads(k), heads(v)
    w = heads(att.get_parameter("time_decay")) + heads(decay)
    kept = torch.exp(-torch.exp(w.clamp(max=BEYOND)))
    y = (wkv @ r.unsqueeze(-1)).squeeze(-1)
    y = y + v * (heads(att.get_parameter("time_faaaa")) * k * r).sum(dim=-1, keepdim=True)
    wkv.mul_(kept.unsqueeze(-2)).add_(v.unsqueeze(-1) @ k.unsqueeze(-2))
    return (_norm_heads(att, y) * F.silu(gate)).to(gate.dtype)


def square_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def pick(
    logits: Tensor,
    sampling: Sampling,
    uniforms: Tensor,
    counts: Tensor | None,
    banned: Tensor | None,
) -> Tensor:
    tokens = pick_tokens(logits, sampling, uniforms, counts=counts, banned=banned)
    if counts is not None:
        counts.copy_(count_tokens(counts, tokens, sampling))
    return tokens


def _norm_shift(
    x: Tensor, added: Tensor | None, norm: nn.LayerNorm, shift: Tensor
) -> tuple[Tensor, Tensor]:
    if added is not None:
        x.add_(added)
    normed = norm(x)
    before = shift - normed
    shift.copy_(normed)
    return normed, before


def _norm_heads(att: nn.Module, y: Tensor) -> Tensor:
    """Group norm over each head of y [B, H, N]; [B, H N]."""
    norm = att.get_submodule("ln_x")
    assert isinstance(norm, nn.GroupNorm)
    weight, bias = norm.weight.to(y.dtype), norm.bias.to(y.dtype)
    return F.group_norm(y.flatten(1), norm.num_groups, weight, bias, norm.eps)
