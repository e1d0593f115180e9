"""From flags to an objective over chosen and rejected answers."""

from typing import Any

from losses.dpo import DPO
from losses.kto import KTO
from losses.orpo import ORPO
from losses.preference import Preference
from losses.preference_flags import DPOFlags, KTOFlags, ORPOFlags, SimPOFlags
from losses.simpo import SimPO
from rwkv.chunks import ChunkPlan
from rwkv.errors import InputError
from rwkv.flags import Settings


def make_preference(chosen: str, settings: Settings, chunks: ChunkPlan | None) -> Any:
    """The objective of that name; its `reference` is None.

    Raises:
        InputError: a value is out of its range.
    """
    check_ranges(settings)
    dpo, orpo = settings[DPOFlags], settings[ORPOFlags]
    simpo, kto = settings[SimPOFlags], settings[KTOFlags]
    if chosen == "dpo":
        loss = DPO(dpo.dpo_beta, dpo.dpo_loss, dpo.dpo_label_smoothing)
        return Preference(loss, dpo.dpo_alpha, chunks)
    if chosen == "orpo":
        return Preference(ORPO(orpo.orpo_alpha), 1.0, chunks)
    if chosen == "simpo":
        return Preference(SimPO(simpo.simpo_beta, simpo.simpo_gamma), simpo.simpo_alpha, chunks)
    return KTO(kto.kto_beta, kto.kto_desirable, kto.kto_undesirable, kto.kto_alpha, chunks)


def check_ranges(settings: Settings) -> None:
    """Stop at a value that makes no sense."""
    values = settings.as_flags()
    for name in ("dpo_beta", "simpo_beta", "kto_beta"):
        if values[name] <= 0:
            raise InputError(f"--{name} {values[name]}: must be above 0")
    for name in (
        "dpo_alpha",
        "orpo_alpha",
        "simpo_alpha",
        "simpo_gamma",
        "kto_alpha",
        "kto_desirable",
        "kto_undesirable",
    ):
        if values[name] < 0:
            raise InputError(f"--{name} {values[name]}: must be at least 0")
    smoothing = values["dpo_label_smoothing"]
    if not 0 <= smoothing < 0.5:
        raise InputError(f"--dpo_label_smoothing {smoothing}: outside 0 to below 0.5; 0.1 is usual")
