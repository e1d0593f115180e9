"""BlinkDL's initialization and parameter groups for training from scratch.

The weights of linear layers are those of RWKV-LM's generate_init_weight, whose file its trainer
loads over what the layers' constructors draw.

Source: RWKV-LM, RWKV-v7/train_temp/src/model.py (version 7) and RWKV-v5/src/model.py (version 6).
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rwkv.config import RWKVConfig
from rwkv.model import RWKV


@torch.no_grad()
def initialize(model: RWKV, seed: int = 0, *, placed: Callable[[str], None] | None = None) -> None:
    """Fill every parameter of a new model, a block after the other.

    Args:
        model: parameters uninitialized, on the CPU, or on the meta device; a block of these is made
            on the CPU when its turn comes.
        seed: of the random matrices; the same seed gives the same model.
        placed: called with each parameter's name when its block is filled; it may move the
            parameter or replace its module, so that a large model is never whole on the CPU.
    """
    draw = torch.Generator().manual_seed(seed)
    fill = _fill_block7 if model.config.version == 7 else _fill_block6
    block: Any

    def hand_on(name: str, part: nn.Module) -> None:
        if placed is not None:
            for parameter in [n for n, _ in part.named_parameters()]:
                placed(f"{name}.{parameter}")

    for layer, block in enumerate(model.blocks):
        _made(block)
        for norm in (block.ln0, block.ln1, block.ln2):
            if norm is not None:
                norm.reset_parameters()
        fill(block, model.config, layer, draw)
        block.att.ln_x.weight.fill_(((1 + layer) / model.config.n_layer) ** 0.7)
        block.att.ln_x.bias.zero_()
        hand_on(f"blocks.{layer}", block)
    _made(model.ln_out).reset_parameters()
    embedding, head = _made(model.emb).weight, _made(model.head).weight
    assert embedding is not None and head is not None
    _uniform(embedding, 1e-4, draw)
    V, C = head.shape
    nn.init.orthogonal_(head, gain=0.5 * math.sqrt(max(V / C, 1.0)), generator=draw)
    for name in ("ln_out", "emb", "head"):
        hand_on(name, model.get_submodule(name))


Part = TypeVar("Part", bound=nn.Module)


def _made(part: Part) -> Part:
    """The part with its parameters on the CPU, if they were on the meta device."""
    if any(parameter.is_meta for parameter in part.parameters()):
        part.to_empty(device="cpu")
    return part


def learning_rate_factor(name: str) -> float:
    """How many times the base rate a parameter learns at: 2 for the decay's offset, else 1."""
    return 2.0 if name.endswith(("att.w0", "att.time_decay")) else 1.0


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices named `weight` only."""
    return name.endswith(".weight") and parameter.squeeze().ndim >= 2


def _uniform(weight: Tensor, bound: float, draw: torch.Generator) -> None:
    weight.uniform_(-bound, bound, generator=draw)


def _orthogonal(weight: Tensor, scale: float, draw: torch.Generator) -> None:
    rows, columns = weight.shape
    nn.init.orthogonal_(weight, gain=scale * math.sqrt(max(rows / columns, 1.0)), generator=draw)


def _depth(config: RWKVConfig, layer: int) -> tuple[float, float]:
    """(0 in the first layer to 1 in the last, 1 in the first to almost 0 in the last)."""
    return layer / max(config.n_layer - 1, 1), 1 - layer / config.n_layer


def _fill_block7(block: Any, config: RWKVConfig, layer: int, draw: torch.Generator) -> None:
    att, ffn = block.att, block.ffn
    C, A, N = config.n_embd, config.dim_att, config.head_size
    rising, falling = _depth(config, layer)
    position = torch.arange(C) / C
    for name, power in {
        "x_r": 0.2 * falling,
        "x_w": 0.9 * falling,
        "x_k": 0.7 * falling,
        "x_v": 0.7 * falling,
        "x_a": 0.9 * falling,
        "x_g": 0.2 * falling,
    }.items():
        getattr(att, name).copy_((1 - position**power).view(1, 1, C))

    along = torch.arange(A) / max(A - 1, 1)
    linear = along - 0.5
    middle = (N - 1) / 2
    zigzag = (torch.arange(A) % N - middle) / max(middle, 0.5)
    zigzag = zigzag * zigzag.abs()
    speed = -6 + 6 * along ** (1 + rising**0.3)
    att.w0.copy_((speed + 0.5 + 2.5 * zigzag).view(1, 1, A))
    att.a0.copy_((-0.19 + 0.3 * zigzag + 0.4 * linear).view(1, 1, A))
    if layer > 0:
        att.v0.copy_((0.73 - 0.4 * linear).view(1, 1, A))
    for name in "wavg":
        if hasattr(att, f"{name}1"):
            getattr(att, f"{name}1").zero_()
            _orthogonal(getattr(att, f"{name}2"), 0.1, draw)
    att.k_k.copy_((0.71 - 0.1 * linear).view(1, 1, A))
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0)):
        nn.init.orthogonal_(getattr(att, name).weight, gain=gain, generator=draw)
    att.output.weight.zero_()

    ffn.x_k.copy_((1 - position ** (falling**4)).view(1, 1, C))
    nn.init.orthogonal_(ffn.key.weight, gain=1.0, generator=draw)
    ffn.value.weight.zero_()


def _fill_block6(block: Any, config: RWKVConfig, layer: int, draw: torch.Generator) -> None:
    att, ffn = block.att, block.ffn
    C, A = config.n_embd, config.dim_att
    rising, falling = _depth(config, layer)
    position = torch.arange(C) / C
    for name, power, offset in (
        ("x", falling, 0.0),
        ("w", falling, 0.0),
        ("k", falling, 0.0),
        ("v", falling, 0.3 * rising),
        ("r", 0.5 * falling, 0.0),
        ("g", 0.5 * falling, 0.0),
    ):
        value = 1 - (position**power + offset)
        getattr(att, f"time_maa_{name}").copy_(value.view(1, 1, C))
    att.time_maa_w1.zero_()
    _uniform(att.time_maa_w2, 0.01, draw)

    along = torch.arange(A) / max(A - 1, 1)
    att.time_decay.copy_((-6 + 5 * along ** (0.7 + 1.3 * rising)).view(1, 1, A))
    att.time_decay_w1.zero_()
    _uniform(att.time_decay_w2, 0.01, draw)
    zigzag = ((torch.arange(A) + 1) % 3 - 1) * 0.1
    att.time_faaaa.copy_((rising * (1 - along) + zigzag).view_as(att.time_faaaa))
    for name, gain in (("receptance", 1.0), ("key", 0.1), ("value", 1.0), ("gate", 0.1)):
        nn.init.orthogonal_(getattr(att, name).weight, gain=gain, generator=draw)
    att.output.weight.zero_()

    ffn.time_maa_k.copy_((1 - position**falling).view(1, 1, C))
    ffn.time_maa_r.copy_((1 - position**falling).view(1, 1, C))
    nn.init.orthogonal_(ffn.key.weight, gain=1.0, generator=draw)
    ffn.value.weight.zero_()
    ffn.receptance.weight.zero_()
