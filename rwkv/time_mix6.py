"""RWKV-6's time mix, with the parameter names of BlinkDL's .pth files.

Source: "Eagle and Finch: RWKV with matrix-valued states and dynamic recurrence",
arXiv:2404.05892.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv.config import RWKVConfig
from rwkv.linear import Linear
from rwkv.ops.head_output import head_output6
from rwkv.ops.low_rank import low_rank
from rwkv.ops.norm_mix import norm_shift_mix_by_data
from rwkv.ops.wkv6 import wkv6

MIXES = 5  # w, k, v, r, g, in the order of time_maa_w2


class TimeMix6(nn.Module):
    """Reads and writes the wkv state, one head at a time.

    C channels = H heads of N. What each parameter makes:
        time_maa_x, time_maa_w1, time_maa_w2    how far each of the five mixes follows the data
        time_maa_w .. time_maa_g                inputs of w, k, v, r, g
        time_decay, time_decay_w1, time_decay_w2    decay
        time_faaaa                              bonus u of the current token
        time_state    initial wkv state [H, N, N], only where one is tuned; values on rows
    """

    def __init__(self, config: RWKVConfig, layer: int, backend: str = "auto"):
        super().__init__()
        C, A, N, ranks = config.n_embd, config.dim_att, config.head_size, config.ranks
        self.layer, self.N, self.backend = layer, N, backend

        def channels(width: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, width))

        self.time_maa_x = channels(C)
        self.time_maa_w, self.time_maa_k, self.time_maa_v = channels(C), channels(C), channels(C)
        self.time_maa_r, self.time_maa_g = channels(C), channels(C)
        self.time_maa_w1 = nn.Parameter(torch.empty(C, MIXES * ranks.mix))
        self.time_maa_w2 = nn.Parameter(torch.empty(MIXES, ranks.mix, C))
        self.time_decay = channels(A)
        self.time_decay_w1 = nn.Parameter(torch.empty(C, ranks.decay))
        self.time_decay_w2 = nn.Parameter(torch.empty(ranks.decay, A))
        self.time_faaaa = nn.Parameter(torch.empty(A // N, N))
        self.receptance, self.key, self.value = Linear(C, A), Linear(C, A), Linear(C, A)
        self.gate, self.output = Linear(C, A), Linear(A, C)
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
        """Mix T tokens; as TimeMix7.forward, with v_first handed on as it is."""
        x, (x_w, x_k, x_v, x_r, x_g), shift = norm_shift_mix_by_data(
            x,
            norm,
            shift,
            self.time_maa_x,
            self.time_maa_w1,
            self.time_maa_w2,
            (
                self.time_maa_w,
                self.time_maa_k,
                self.time_maa_v,
                self.time_maa_r,
                self.time_maa_g,
            ),
            cu_seqlens,
        )
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        decay, _ = low_rank(x_w, self.time_decay_w1)
        w = F.linear(torch.tanh(decay), self.time_decay_w2.t(), self.time_decay.flatten())
        r, w, k, v = (t.unflatten(-1, (-1, self.N)) for t in (r, w, k, v))
        y, wkv = wkv6(
            r=r,
            w=w,
            k=k,
            v=v,
            u=self.time_faaaa,
            state=wkv,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        out = head_output6(y, self.ln_x, self.gate(x_g))
        return self.output(out, residual=x), v_first, shift, wkv
