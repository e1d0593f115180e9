"""The channel mixes of RWKV-6 and RWKV-7, with the parameter names of BlinkDL's .pth files."""

import torch
from torch import Tensor, nn

from rwkv.config import RWKVConfig
from rwkv.linear import Linear
from rwkv.token_shift import last_token, token_shift


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
        normed = norm(x)
        x_k = torch.addcmul(normed, token_shift(normed, shift, cu_seqlens) - normed, self.x_k)
        hidden = torch.relu(self.key(x_k)).square()
        return self.value(hidden, residual=x), last_token(normed, cu_seqlens)


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
        normed = norm(x)
        before = token_shift(normed, shift, cu_seqlens) - normed
        x_k = torch.addcmul(normed, before, self.time_maa_k)
        x_r = torch.addcmul(normed, before, self.time_maa_r)
        value = self.value(torch.relu(self.key(x_k)).square())
        out = torch.addcmul(x, torch.sigmoid(self.receptance(x_r)), value)
        return out, last_token(normed, cu_seqlens)
