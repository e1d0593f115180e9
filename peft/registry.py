"""Every adapter under its word in a layer profile, and how one is built from a plan."""

from peft.adapter import AdapterLinear
from peft.bone import BoneLinear
from peft.dora import ColumnDoraLinear, DoraLinear
from peft.lora import LoraLinear
from peft.miss import MissLinear
from peft.pissa import PissaLinear
from rwkv.linear import Linear

ADAPTERS: dict[str, type[AdapterLinear]] = {
    cls.MODE: cls
    for cls in (LoraLinear, DoraLinear, ColumnDoraLinear, BoneLinear, MissLinear, PissaLinear)
}
LOW_RANK = frozenset(mode for mode, cls in ADAPTERS.items() if issubclass(cls, LoraLinear))


def make_adapter(
    mode: str,
    base: Linear,
    *,
    rank: int,
    scale: float = 1.0,
    dropout: float = 0.0,
    power: int = 4,
    of_file: bool = False,
) -> AdapterLinear:
    """A fresh adapter over `base`; it leaves the layer's output as it is.

    Args:
        mode: a key of ADAPTERS.
        base: the layer, with its weight or its store.
        rank: as in the adapter's `sizes`.
        scale: factor of the update; Bone and MiSS have none.
        dropout: share of inputs that the adapter does not see; Bone and MiSS have none.
        power: PiSSA's power iterations.
        of_file: it takes over what a file holds, where LoRA and DoRA have any rank.

    Raises:
        InputError: the rank does not suit the weight; see `AdapterLinear.check_new`.
    """
    cls = ADAPTERS[mode]
    if not of_file:
        cls.check_new(base.out_features, base.in_features, rank)
    if issubclass(cls, PissaLinear):
        return cls(base, rank=rank, scale=scale, dropout=dropout, power=power)
    if issubclass(cls, LoraLinear):
        return cls(base, rank=rank, scale=scale, dropout=dropout)
    assert issubclass(cls, BoneLinear | MissLinear)
    return cls(base, rank=rank)
