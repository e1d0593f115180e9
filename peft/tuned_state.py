"""State tuning: what every text starts from is trained, a wkv state or a prefix of embeddings.

One parameter `blocks.N.att.time_state` a layer, [H, N, N], float32, values on rows and keys on
columns. RWKV-LM-RLHF writes its states so, and the PyPI package `rwkv` reads them so; what keeps
keys on rows inside (its RWKV-6) turns them as it loads.
"""

from typing import Any

import torch
from torch import nn

from peft.plan import STATE
from rwkv.config import RWKVConfig
from rwkv.model import RWKV


def add_tuned_state(model: RWKV) -> None:
    """Give each layer an initial wkv state to train, zeros at first: nothing changes by it.

    A state that is there already, from a file, is trained on. It stays float32 in a model of any
    dtype, but for DeepSpeed, which casts all that trains; and on the model's device.
    """
    home = model.device
    for block in model.blocks:
        att: Any = block.att
        if att.time_state is None:
            att.time_state = nn.Parameter(
                torch.zeros(state_shape(model.config), dtype=torch.float32, device=home)
            )
        att.time_state.requires_grad_(True)


def add_prefix(model: RWKV, length: int) -> None:
    """Give the model embeddings to train that it reads before every text, [length, C], float32.

    They begin as the embeddings of tokens drawn at random.
    """
    tokens = torch.randint(model.config.vocab_size, (length,)).to(model.device)
    model.prefix = nn.Parameter(model.emb(tokens).detach().float())


def state_shape(config: RWKVConfig) -> tuple[int, int, int]:
    """Of one layer's state, (H, N, N)."""
    return config.n_head, config.head_size, config.head_size


def describe_state(config: RWKVConfig) -> str:
    """The line about the state in the plan of a run."""
    H, N, _ = state_shape(config)
    return (
        f"state: {config.n_layer * H * N * N:,} parameters train besides, "
        f"{STATE} [{H}, {N}, {N}] in each of {config.n_layer} layers"
    )


def describe_prefix(config: RWKVConfig, length: int) -> str:
    """The line about the prefix in the plan of a run."""
    return (
        f"prefix: {length * config.n_embd:,} parameters train besides, {length} embeddings "
        "before every text"
    )
