"""RWKV-7's time mix, with the parameter names of BlinkDL's .pth files.

Source: RWKV-7 "Goose", arXiv:2503.14456.
"""

import torch
from torch import Tensor, nn

from rwkv.config import RWKVConfig
from rwkv.linear import Linear
from rwkv.ops.head_output import head_output7
from rwkv.ops.low_rank import low_rank
from rwkv.ops.norm_mix import norm_shift_mix
from rwkv.ops.wkv7 import wkv7
from rwkv.ops.wkv7_inputs import wkv7_inputs


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
            the stream [B, T, C], v_first [B, T, C], and each sequence's shift and wkv after the
            tokens.
        """
        first = self.layer == 0
        x, (x_r, x_w, x_k, x_v, x_a, x_g), shift = norm_shift_mix(
            x,
            norm,
            shift,
            (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g),
            cu_seqlens,
        )
        decay, _ = low_rank(x_w, self.w1)
        iclr, _ = low_rank(x_a, self.a1)
        gate, _ = low_rank(x_g, self.g1)
        value = None
        if not first:
            value, x_v = low_rank(x_v, self.v1)
        p = wkv7_inputs(
            r=self.receptance(x_r),
            k=self.key(x_k),
            v=self.value(x_v),
            v_first=None if first else v_first,
            decay=torch.tanh(decay) @ self.w2,
            iclr=iclr @ self.a2,
            value=None if value is None else value @ self.v2,
            w0=self.w0,
            a0=self.a0,
            v0=None if first else self.v0,
            k_k=self.k_k,
            k_a=self.k_a,
            r_k=self.r_k,
        )
        y, wkv = wkv7(
            r=p.r,
            w=p.w,
            k=p.k,
            v=p.v,
            a=p.a,
            b=p.b,
            state=wkv,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        gate = torch.sigmoid(gate) @ self.g2
        out = head_output7(y, self.ln_x, p.bonus, p.v_again, gate)
        return self.output(out, residual=x), p.v_first, shift, wkv
