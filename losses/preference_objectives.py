"""From flags to an objective over chosen and rejected answers."""

from typing import Any

from losses.dpo import DPO
from losses.kto import KTO
from losses.orpo import ORPO
from losses.preference import Preference
from losses.preference_flags import DPOFlags, KTOFlags, ORPOFlags, SimPOFlags
from losses.simpo import SimPO
from rwkv.chunks import ChunkPlan
from rwkv.flags import Settings


def make_preference(chosen: str, settings: Settings, chunks: ChunkPlan | None) -> Any:
    """The objective of that name; its `reference` is None.

    Raises:
        InputError: a value is out of its range.
    """
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
