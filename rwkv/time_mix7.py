"""RWKV-7's time mix, with the parameter names of BlinkDL's .pth files.

Source: RWKV-7 "Goose", arXiv:2503.14456.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv.config import RWKVConfig
from rwkv.linear import Linear
from rwkv.ops.wkv7 import wkv7
from rwkv.token_shift import last_token, token_shift


class TimeMix7(nn.Module):
    """Reads and writes the wkv state, one head at a time.

    C channels = H heads of N. What each parameter makes:
        x_r .. x_g    inputs of r, w, k, v, a, g: a mix of this token and the one before
        w0, w1, w2    decay
        a0, a1, a2    in-context learning rate (iclr): how much of the old value a key replaces
        v0, v1, v2    value residual: how far v moves to the first layer's v; not in layer 0
        g1, g2        output gate
        k_k, k_a      removal key kk from k, and how far iclr shrinks k
        r_k           bonus: what the current token adds to its own output
        time_state    initial wkv state [H, N, N], only where one is tuned; values on rows
    """

    def __init__(self, config: RWKVConfig, layer: int, backend: str = "auto"):
        super().__init__()
        C, A, N, ranks = config.n_embd, config.dim_att, config.head_size, config.ranks
        self.layer, self.N, self.backend = layer, N, backend

        def channels(width: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, width))

        def low_rank(rank: int) -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.empty(C, rank)), nn.Parameter(torch.empty(rank, A))

        self.x_r, self.x_w, self.x_k = channels(C), channels(C), channels(C)
        self.x_v, self.x_a, self.x_g = channels(C), channels(C), channels(C)
        self.w0, (self.w1, self.w2) = channels(A), low_rank(ranks.decay)
        self.a0, (self.a1, self.a2) = channels(A), low_rank(ranks.iclr)
        if layer > 0:
            self.v0, (self.v1, self.v2) = channels(A), low_rank(ranks.value)
        self.g1, self.g2 = low_rank(ranks.gate)
        self.k_k, self.k_a = channels(A), channels(A)
        self.r_k = nn.Parameter(torch.empty(A // N, N))
        self.receptance, self.key, self.value = Linear(C, A), Linear(C, A), Linear(C, A)
        self.output = Linear(A, C)
        self.ln_x = nn.GroupNorm(A // N, A, eps=64e-5)  # 1e-5 times 8 squared, as in the files
        self.time_state: nn.Parameter | None = None

    def forward(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        v_first: Tensor | None,
        shift: Tensor,
        wkv: Tensor,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Mix T tokens and add the result to the stream.

        Args:
            x: the stream, [B, T, C].
            norm: the layer norm in front of the mix.
            v_first: the first layer's values, [B, T, C]; None in layer 0, which makes them.
            shift, wkv: each sequence's state before these tokens, [Q, C] and [Q, H, N, N].
            cu_seqlens: for packed texts, [Q + 1]; see wkv7.

        Returns:
            the stream [B, T, C], v_first [B, T, C], and each sequence's shift and wkv after the tokens.
        """
        B, T, _ = x.shape
        normed = norm(x)
        before = token_shift(normed, shift, cu_seqlens) - normed
        x_r, x_w, x_k, x_v, x_a, x_g = (
            torch.addcmul(normed, before, mix)
            for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        decay = self.w0 + torch.tanh(x_w @ self.w1) @ self.w2
        w = -F.softplus(-decay.to(torch.promote_types(decay.dtype, torch.float32))) - 0.5
        iclr = torch.sigmoid(self.a0 + x_a @ self.a1 @ self.a2)
        gate = torch.sigmoid(x_g @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            assert v_first is not None
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + x_v @ self.v1 @ self.v2))

        kk = F.normalize((k * self.k_k).unflatten(-1, (-1, self.N)), dim=-1)  # [B, T, H, N]
        k = k * torch.addcmul(torch.ones_like(self.k_a), iclr - 1, self.k_a)
        r, w, k, v, iclr = (t.unflatten(-1, (-1, self.N)) for t in (r, w, k, v, iclr))
        y, wkv = wkv7(
            r=r,
            w=w.to(v.dtype),
            k=k,
            v=v,
            a=-kk,
            b=kk * iclr,
            state=wkv,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )

        y = self.ln_x(y.reshape(B * T, -1)).view(B, T, -1)
        bonus = (r * k * self.r_k).sum(dim=-1, keepdim=True) * v  # [B, T, H, N]
        out = self.output((y + bonus.flatten(-2)) * gate, residual=x)
        return out, v_first, last_token(normed, cu_seqlens), wkv
