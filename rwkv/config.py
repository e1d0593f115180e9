"""The sizes of a model, every one of them readable from a checkpoint's tensors."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LowRanks:
    """Widths of the low-rank products inside the time mix.

    RWKV-7 has decay, iclr, value and gate; RWKV-6 has decay and mix.
    """

    decay: int = 0
    iclr: int = 0
    value: int = 0
    gate: int = 0
    mix: int = 0


@dataclass(frozen=True)
class RWKVConfig:
    """One model's sizes.

    version: 6 or 7.
    n_layer, n_embd, dim_ffn, vocab_size: blocks, channels, channel-mix width, tokens.
    dim_att: channels inside the time mix; equal to n_embd in every published model.
    head_size: channels of one head.
    """

    version: int
    n_layer: int
    n_embd: int
    dim_ffn: int
    vocab_size: int
    head_size: int = 64
    dim_att: int = 0
    ranks: LowRanks = field(default_factory=LowRanks)

    def __post_init__(self) -> None:
        if self.version not in (6, 7):
            raise ValueError(f"config: version {self.version} is not 6 or 7")
        if not self.dim_att:
            object.__setattr__(self, "dim_att", self.n_embd)
        if self.dim_att % self.head_size:
            raise ValueError(
                f"config: {self.dim_att} channels are no whole number of heads of {self.head_size}"
            )

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size

    @property
    def name(self) -> str:
        return f"RWKV-{self.version} L{self.n_layer}-D{self.n_embd}"


def default_ranks(version: int, n_embd: int) -> LowRanks:
    """The low-rank widths that BlinkDL's trainers choose for a new model of n_embd channels.

    Source: RWKV-LM, RWKV-v7/train_temp/src/model.py and RWKV-v5/src/model.py.
    """
    if version == 6:
        wide = n_embd >= 4096
        return LowRanks(decay=128 if wide else 64, mix=64 if wide else 32)

    def width(factor: float) -> int:
        return max(32, round(factor * n_embd**0.5 / 32) * 32)

    return LowRanks(decay=width(2.5), iclr=width(2.5), value=width(1.7), gate=width(5.0))


def default_ffn(version: int, n_embd: int) -> int:
    """The channel mix's width of a new model: 4 C in RWKV-7, 3.5 C to a multiple of 32 in 6."""
    return 4 * n_embd if version == 7 else int(3.5 * n_embd) // 32 * 32
