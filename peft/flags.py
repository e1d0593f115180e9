"""Flags that say which layers train and how frozen weights are stored. Imports no torch."""

from dataclasses import dataclass

from rwkv.flags import flag

QUANT_MODES = ("nf4", "nf4_double", "fp4", "fp4_double", "int8", "fp8", "fp6", "fp6_e2m3", "fp5")
QUANT_ALIASES = {"4bit": "nf4", "fp6ao": "fp6"}


@dataclass(frozen=True)
class PeftFlags:
    """Layers: what trains, and how the frozen rest is stored"""

    layer_profile: str = flag(
        "", "which layers train and how: a .json of rules or a .csv; without it all train in full"
    )
    limited_lora: bool = flag(
        False, "train adapters alone, not the norms and small vectors of the same blocks"
    )
    layerwise_lr: bool = flag(True, "train the decay's offset at twice the rate, as BlinkDL does")
    load_adapter: str = flag("", "go on from this adapter file; the profile must describe it")
    rslora: bool = flag(False, "scale LoRA by alpha / sqrt(rank) instead of alpha / rank")
    lora_plus_ratio: float = flag(
        1.0, "rate of lora_B over that of lora_A (LoRA+); its paper uses 16", within="(0, inf)"
    )
    svd_niter: int = flag(
        4, "power iterations of PiSSA's SVD; 0 computes the exact one", within="[0, inf)"
    )
    quant: bool = flag(False, "store frozen weights as --quant_mode")
    quant_mode: str = flag(
        "nf4",
        "storage of frozen weights; 4bit means nf4, fp6ao means fp6",
        choices=(*QUANT_MODES, *QUANT_ALIASES),
    )
    quant_head: bool = flag(False, "quantize head and embedding too, where they are frozen")


@dataclass(frozen=True)
class StateFlags:
    """State tuning; its rates are the profile's state_lr_init and state_lr_final"""

    state: bool = flag(
        False,
        "train the wkv state that texts start from, beside what the profile trains",
    )
    prefix_tuning: bool = flag(
        False, "train embeddings that are read before every text; the state behind them is saved"
    )
    prefix_token_len: int = flag(128, "number of these embeddings", within="[1, inf)")

    @property
    def changes_start(self) -> bool:
        """Whether texts start from something that trains."""
        return self.state or self.prefix_tuning
