"""The model: embedding, blocks, final norm and head, with state in and state out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.channel_mix import ChannelMix6, ChannelMix7
from rwkv.config import RWKVConfig
from rwkv.keeper import Kept
from rwkv.linear import Embedding, Linear
from rwkv.offload import HostPlace
from rwkv.ops.kept import WKV_BYTES
from rwkv.recompute import recomputed
from rwkv.scattered import is_scattered
from rwkv.state import LayerState, State, zero_state
from rwkv.time_mix6 import TimeMix6
from rwkv.time_mix7 import TimeMix7

LAYERS: dict[int, tuple[Any, Any]] = {6: (TimeMix6, ChannelMix6), 7: (TimeMix7, ChannelMix7)}


class Block(nn.Module):
    """Time mix and channel mix, each behind a layer norm and added to the stream.

    The first block also norms the embedding (`ln0`), as in BlinkDL's files. `shift_state` is what
    time mix and channel mix take for the token before a text, [2, C], only where one was tuned.
    """

    def __init__(self, config: RWKVConfig, layer: int, backend: str = "auto"):
        super().__init__()
        time_mix, channel_mix = LAYERS[config.version]
        self.ln0 = nn.LayerNorm(config.n_embd) if layer == 0 else None
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = time_mix(config, layer, backend)
        self.ffn = channel_mix(config)
        self.att.output.closes = True
        self.ffn.value.closes = config.version == 7  # version 6 multiplies it by its gate
        self.shift_state: nn.Parameter | None = None

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        state: LayerState,
        cu_seqlens: Tensor | None,
        *,
        in_halves: bool = False,
        kept: Kept = Kept.SMALL,
        ends: bool = False,
        place: HostPlace | None = None,
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """x [B, T, C] and this layer's state in; x, v_first and the state after T tokens out.

        in_halves: recompute time mix and channel mix in the backward pass, each by itself, so that
            the activations of only one of them exist at a time.
        kept: and keep these results.
        ends: but run the channel mix once all the same: the backward pass begins with it.
        place: for what the halves start from; None to keep it on the device.
        """
        run: Callable[..., Any] = _call
        if in_halves:
            draws = any(m.p and m.training for m in self.modules() if isinstance(m, nn.Dropout))
            run = partial(recomputed, model=self, closed=True, draws=draws, kept=kept, place=place)
        x, v_first, att_shift, wkv = run(
            self._mix_time, x, v_first, state.att_shift, state.wkv, cu_seqlens
        )
        run = _call if ends else run
        x, ffn_shift = run(self.ffn, x, self.ln2, state.ffn_shift, cu_seqlens)
        return x, v_first, LayerState(att_shift, wkv, ffn_shift)

    def _mix_time(
        self,
        x: Tensor,
        v_first: Tensor | None,
        shift: Tensor,
        wkv: Tensor,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        if self.ln0 is not None:
            x = self.ln0(x)
        return self.att(x, self.ln1, v_first, shift, wkv, cu_seqlens)


def kept_bytes(
    block: Any, config: RWKVConfig, itemsize: int, texts: int, tokens: int
) -> tuple[int, int]:
    """Bytes of a block's large products over `tokens` in `texts`, and of what wkv gives and keeps.

    Of all kernels of a GPU that which keeps most is counted.
    """
    linear = [m for m in block.modules() if isinstance(m, Linear) and not m.closes]
    kept = max(
        size.in_texts(texts, tokens).kept
        for (version, kernel), size in WKV_BYTES.items()
        if version == config.version and kernel != "torch"
    )
    wkv = tokens * config.dim_att * (itemsize + kept)
    return tokens * itemsize * sum(m.out_features for m in linear), int(wkv)


def keeps_end(config: RWKVConfig, tokens: int) -> bool:
    """Whether the last block keeps what its channel mix makes, and of its time mix all results.

    The backward pass begins with it, so that this takes no memory at the peak, where a time mix is
    at work: RWKV-7's then holds some 28 vectors of a token. Before that there are these, 13, beside
    the head's 5, a piece of 2^28 logits and the gradient of a head that trains: less, if there are
    enough tokens. RWKV-6's time mix holds too little.
    """
    return config.version == 7 and tokens * config.n_embd >= 3 * 2**24


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class RWKV(nn.Module):
    """A language model of version 6 or 7. Its state_dict has the keys of BlinkDL's files.

    Parameters are uninitialized: `rwkv.checkpoint.load_model` fills them from a file,
    `rwkv.init.initialize` for training from scratch.

    Attributes:
        config: the sizes.
        grad_cp: recompute each half of a block in the backward pass instead of keeping its
            activations; only the stream before and within each block is kept, and products of low
            rank. "selective" keeps the results of its large products and of wkv too, and computes
            the rest again. The last block may keep more, see `keeps_end`.
        grad_cp_memory: bytes that "selective" may keep; 0 for no limit.
        grad_cp_offload: and the stream is kept in host memory; on the device as little as can be,
            but for what "selective" keeps.
        prefix: embeddings [n, C] that are read before every text, only where they are tuned.
    """

    def __init__(self, config: RWKVConfig, backend: str = "auto"):
        super().__init__()
        self.config = config
        self.grad_cp: bool | str = False
        self.grad_cp_memory = 0
        self.grad_cp_offload = False
        self.prefix: nn.Parameter | None = None
        self.emb = Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(
            Block(config, layer, backend) for layer in range(config.n_layer)
        )
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
        self.head.gives_logits = True

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.ln_out.weight.device

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        final_states: int | None = None,
    ) -> tuple[Tensor, State]:
        """Read T tokens of each sequence.

        Args:
            tokens: ids, [B, T]; for packed texts B = 1.
            state: one LayerState a layer, of Q sequences; None for new texts.
            cu_seqlens: where packed texts start, and T, [Q + 1], int64; None for plain rows.
            final_states: of how many sequences, the last ones, the state is wanted; None for all.

        Returns:
            hidden: what the head reads, [B, T, C].
            state: each wanted sequence's state after its tokens; of none, [].
        """
        return self.run_blocks(self.emb(tokens), state, cu_seqlens, final_states=final_states)

    def run_blocks(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        final_states: int | None = None,
    ) -> tuple[Tensor, State]:
        """As `forward`, from embedded tokens [B, T, C]."""
        if state is None:
            state = self.initial_state(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        scattered = is_scattered(self)
        if torch.is_grad_enabled() and not x.requires_grad and scattered:
            # DeepSpeed scatters a module's parameters again once the gradients of its inputs are
            # there, so that each needs an input with a gradient, on all ranks alike.
            x = x.detach().requires_grad_()
        v_first: Tensor | None = None
        place = None
        if self.grad_cp and self.grad_cp_offload and torch.is_grad_enabled():
            place = HostPlace(x.device)
        after = []
        levels = self._kept_by_blocks(x, x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        last = None
        if final_states == 0 and keeps_end(self.config, x.shape[0] * x.shape[1]):
            last, levels[-1] = self.blocks[-1], Kept.ALL
        for block, before, kept in zip(self.blocks, state, levels, strict=True):
            if self.grad_cp and scattered:  # DeepSpeed's hooks want the whole block
                x, v_first, new = recomputed(
                    block, x, v_first, before, cu_seqlens, model=block, place=place
                )
            else:
                x, v_first, new = block(
                    x,
                    v_first,
                    before,
                    cu_seqlens,
                    in_halves=bool(self.grad_cp),
                    kept=kept,
                    ends=block is last,
                    place=place,
                )
            if final_states is None:
                after.append(new)
            elif final_states:
                after.append(new.last(final_states))
            del new  # what is not handed on is free before the next block runs
        return self.ln_out(x), after

    def _kept_by_blocks(self, x: Tensor, texts: int) -> list[Kept]:
        """What each block keeps of its own run over x [B, T, C], which holds so many texts.

        Within `grad_cp_memory` the products of as many blocks as fit, the last ones, whose turn
        comes first in the backward pass; then wkv's results, which take more room for what they
        spare.
        """
        count = self.config.n_layer
        if self.grad_cp != "selective":
            return [Kept.LAST if self.grad_cp_offload else Kept.SMALL] * count
        if not self.grad_cp_memory:
            return [Kept.ALL] * count
        levels, left = [Kept.SMALL] * count, self.grad_cp_memory
        tokens = x.shape[0] * x.shape[1]
        sizes = kept_bytes(self.blocks[-1], self.config, x.element_size(), texts, tokens)
        for kept, size in zip((Kept.PRODUCTS, Kept.ALL), sizes, strict=True):
            room = left // size
            for layer in range(max(count - room, 0), count):
                levels[layer] = kept
            left -= min(room, count) * size
            if room < count:
                break
        return levels

    def initial_state(self, Q: int) -> State:
        """The state of Q new texts: zeros or what was tuned, after the prefix if there is one.

        The prefix is read once for all texts.
        """
        state = zero_state(self.config, 1 if self.prefix is not None else Q, self.ln_out.weight)
        block: Any
        for layer, block in enumerate(self.blocks):
            if block.att.time_state is not None:
                wkv = block.att.time_state.to(state[layer].wkv.dtype).expand_as(state[layer].wkv)
                state[layer] = state[layer]._replace(wkv=wkv)
            if block.shift_state is not None:
                att, ffn = (x.expand_as(state[layer].att_shift) for x in block.shift_state)
                state[layer] = state[layer]._replace(
                    att_shift=att.to(state[layer].att_shift),
                    ffn_shift=ffn.to(state[layer].ffn_shift),
                )
        if self.prefix is None:
            return state
        _, state = self.run_blocks(self.prefix.to(self.ln_out.weight.dtype).unsqueeze(0), state)
        first = torch.zeros(Q, dtype=torch.int64, device=self.device)
        return [layer.select(first) for layer in state]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., V]."""
        return self.head(hidden)
