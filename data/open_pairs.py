"""The preference data of a run: its records, and the reference scores that belong to its model."""

from typing import Any

from data.pair_records import PAIRS
from data.pair_store import PairStore
from data.records import DataError
from data.reference_scores import Scorer, attach
from data.store_cache import open_store
from rwkv.tokenizer import Tokenizer


def open_pairs(
    paths: str,
    flags: Any,
    tokenizer: Tokenizer,
    *,
    longest: int = 0,
    singles: bool = False,
    scorer: Scorer | None = None,
    live: bool = False,
) -> PairStore:
    """The records of preference files.

    Args:
        paths: one or several with commas between them.
        flags: DataFlags.
        tokenizer: the model's.
        longest: see PairStore.
        singles: whether answers may come alone.
        scorer: the reference model; None for objectives without one.
        live: whether the run can be its own reference model, so that scores may be missing.

    Raises:
        DataError: a file is wrong, holds single answers where pairs are needed, or has no
            reference scores of the run's model where it needs them.
    """
    store = open_store(paths, flags, tokenizer, PAIRS)
    assert isinstance(store, PairStore)
    store.longest = longest
    chosen, rejected = store.by_record["chosen"], store.by_record["rejected"]
    alone = int(((chosen == 0) | (rejected == 0)).sum())
    if alone and not singles:
        raise DataError(
            f"{paths}: {alone:,} of {len(store):,} records have one answer only; "
            "use --kto, or give each prompt a chosen and a rejected answer"
        )
    if scorer is not None and not attach(store, scorer, required=not live):
        store.reference = None
    return store
