"""The channel mixes of RWKV-6 and RWKV-7, with the parameter names of BlinkDL's .pth files."""

import torch
from torch import Tensor, nn

from rwkv.config import RWKVConfig
from rwkv.linear import Linear
from rwkv.ops.activation import gated_sum
from rwkv.ops.norm_mix import norm_shift_mix


class ChannelMix7(nn.Module):
    """y = W_value relu(W_key x_k)^2. Source: arXiv:2503.14456."""

    def __init__(self, config: RWKVConfig):
        super().__init__()
        C = config.n_embd
        self.x_k = nn.Parameter(torch.empty(1, 1, C))
        self.key, self.value = Linear(C, config.dim_ffn), Linear(config.dim_ffn, C)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, shift: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix the channels of norm(x) and add the result to the stream x [B, T, C].

        Returns the stream and each sequence's shift, [Q, C].
        """
        x, (x_k,), shift = norm_shift_mix(x, norm, shift, [self.x_k], cu_seqlens)
        return self.value(self.key(x_k, activated=True), residual=x), shift


class ChannelMix6(nn.Module):
    """y = sigmoid(W_receptance x_r) * W_value relu(W_key x_k)^2. Source: arXiv:2404.05892."""

    def __init__(self, config: RWKVConfig):
        super().__init__()
        C = config.n_embd
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key, self.value = Linear(C, config.dim_ffn), Linear(config.dim_ffn, C)
        self.receptance = Linear(C, C)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, shift: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix the channels of norm(x) and add the result to the stream x [B, T, C].

        Returns the stream and each sequence's shift, [Q, C].
        """
        mixes = (self.time_maa_k, self.time_maa_r)
        x, (x_k, x_r), shift = norm_shift_mix(x, norm, shift, mixes, cu_seqlens)
        value = self.value(self.key(x_k, activated=True))
        return gated_sum(x, self.receptance(x_r), value), shift
