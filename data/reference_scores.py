"""Reference scores beside a store of pairs: which model gave them, and whether they are still true.

    reference-KEY.npy    float32 [records, 2]: log-probability of the chosen and the rejected answer
    reference-KEY.json   the model, adapter and storage that KEY stands for

KEY is a hash of model, adapter, storage and tokens; the tokens depend on text, template and
tokenizer. While scores are being made the array is `reference-KEY.part.npy` with nan for what is
to be done.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.pair_store import PairStore
from data.records import DataError
from rwkv.files import replacing


@dataclass(frozen=True)
class Scorer:
    """The reference model.

    model: a fingerprint of the base.
    adapter: see `adapter_words`.
    storage: a fingerprint of what is kept in fewer bits, "" for nothing; see `storage_words`.
    """

    model: str
    adapter: str = ""
    storage: str = ""

    @property
    def words(self) -> str:
        """For messages."""
        adapter = f" with adapter {self.adapter}" if self.adapter else ""
        return f"model {self.model}{adapter}" + (f" in {self.storage}" if self.storage else "")

    def key(self, content: str) -> str:
        """What names the scores of a store with that fingerprint."""
        text = json.dumps([self.model, self.adapter, self.storage, content])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def storage_words(kinds: Mapping[str, str]) -> str:
    """What tells one storage of a model from another, such as "nf4-1b9c"; "" for no stored layer.

    Args:
        kinds: the word of each layer that is kept in fewer bits.
    """
    if not kinds:
        return ""
    text = json.dumps(sorted(kinds.items()))
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{'+'.join(sorted(set(kinds.values())))}-{digest}"


def adapter_words(path: Path | str | None, scales: Iterable[float] = ()) -> str:
    """What tells one adapter from another: a hash of its file; "" for none.

    scales: alpha / rank of its layers where the file does not state them, added as in "1b9c x 2".
    """
    if not path:
        return ""
    return " x ".join([file_fingerprint(path), *sorted({f"{scale:g}" for scale in scales})])


def file_fingerprint(path: Path | str) -> str:
    """A hash of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def score_paths(folder: Path, scorer: Scorer) -> tuple[Path, Path]:
    """Where a folder's scores by that model are, finished and unfinished."""
    key = scorer.key(PairStore([folder]).fingerprint)
    return folder / f"reference-{key}.npy", folder / f"reference-{key}.part.npy"


def open_unfinished(folder: Path, scorer: Scorer) -> np.ndarray:
    """The array to write scores to, [records, 2]; nan where there is none yet.

    What an earlier command wrote before it was killed is kept.
    """
    records = len(PairStore([folder]))
    done, part = score_paths(folder, scorer)
    if done.exists():
        return np.load(done)
    if part.exists():
        try:
            found = np.lib.format.open_memmap(part, mode="r+")
            if found.shape == (records, 2):
                return found
        except ValueError:
            pass  # killed while its header was written
    with replacing(part) as beside:
        made = np.lib.format.open_memmap(beside, "w+", np.float32, (records, 2))
        made[:] = np.nan
        made.flush()
    return np.lib.format.open_memmap(part, mode="r+")


def finish(folder: Path, scorer: Scorer) -> None:
    """Give complete scores their name."""
    done, part = score_paths(folder, scorer)
    if part.exists():
        with replacing(done.with_suffix(".json")) as beside:
            beside.write_text(json.dumps(asdict(scorer), indent=1) + "\n")
        part.rename(done)


def read_scores(folder: Path, scorer: Scorer) -> np.ndarray:
    """A folder's scores by that model, [records, 2].

    Raises:
        DataError: it has none, unfinished ones, or those of other models only.
    """
    done, part = score_paths(folder, scorer)
    if done.exists():
        try:
            found = np.load(done)
        except (OSError, EOFError, ValueError):
            found = np.empty(0)
        if found.shape != (len(PairStore([folder])), 2) or np.isnan(found).any():
            raise DataError(f"{done}: is damaged; remove it and run python -m data.make_reference")
        return found
    if part.exists():
        raise DataError(
            f"{folder}: its reference scores are unfinished; run the same python -m "
            "data.make_reference again, it goes on where it stopped"
        )
    others = sorted(folder.glob("reference-*.json"))
    if not others:
        raise DataError(
            f"{folder}: has no reference scores, and where more than adapters trains the model "
            "cannot be its own reference; run python -m data.make_reference, or use a profile like "
            "layerprofile/lora-adapters-only.json"
        )
    try:
        known = Scorer(**json.loads(others[-1].read_text()))
    except (ValueError, TypeError):
        raise DataError(
            f"{others[-1]}: is damaged; remove it and run python -m data.make_reference"
        ) from None
    raise DataError(
        f"{folder}: its reference scores are of {known.words}, this run starts from "
        f"{scorer.words}; run python -m data.make_reference with the model of this run, and its "
        "--layer_profile, --quant and --quant_mode where it stores weights in fewer bits"
    )


def has_scores(store: PairStore, scorer: Scorer) -> bool:
    """Whether all folders of a store have scores by that model."""
    return all(score_paths(folder, scorer)[0].exists() for folder in store.folders)


def attach(store: PairStore, scorer: Scorer, *, required: bool) -> bool:
    """Give a store the scores of its folders by that model, if all have them.

    Args:
        store: of one or more folders.
        scorer: the model.
        required: whether a run without scores is impossible.

    Returns:
        whether the store has scores now.

    Raises:
        DataError: they are required and a folder has none, another model's, or unfinished ones.
    """
    if not required and not has_scores(store, scorer):
        return False
    store.reference = np.concatenate([read_scores(f, scorer) for f in store.folders])[store.numbers]
    return True
