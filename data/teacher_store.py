"""A teacher's scores beside the tokens they belong to: what --distillation trains on.

A folder of `python -m data.make_teacher` holds shards and a meta.json that lists them. A shard is a
token store (data/token_store.py) with the row of each token t, about the token after it:

    ids.npy      uint16, [tokens * k]: the k likeliest tokens, likeliest first
    values.npy   float16, [tokens * k]: their log-probabilities
    lse-T.npy    float32, [tokens], for each temperature T beside 1: the log of the sum over the
                 vocabulary of p^(1 / T), with which log-probabilities at T are exact

Log-probabilities rather than logits: float16 is then most precise where a token is likely. With
k = 50 and one temperature a token takes 207 bytes, its own two and its mask included.

Files of RWKV-LM-RLHF have logits and no log-sum-exp; their `normalized` in meta.json is false.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.records import DataError
from data.store_cache import H5_SUFFIXES, content_hash, one_at_a_time, split_paths
from data.token_store import (
    FORMAT,
    META,
    ArrayWriter,
    TokenStore,
    is_store,
    map_array,
    read_meta,
    write_store,
)
from data.tokenizing import Encoded
from rwkv.files import replacing
from rwkv.tokenizer import Tokenizer

if TYPE_CHECKING:
    from data.teacher_pieces import TeacherPieces

SHARDS = "teacher shards"  # the kind of a folder of shards


class Scores(NamedTuple):
    """A teacher's scores of n neighbouring tokens.

    ids, values: [n, k], uint16 and float16.
    lse: for each temperature beside 1, [n], float32.
    """

    ids: np.ndarray
    values: np.ndarray
    lse: dict[float, np.ndarray]


@dataclass(frozen=True)
class Wanted:
    """What a run asks of the scores.

    top_k: most scores a token.
    temperature: of the divergence.
    normalized: whether the divergence needs the log-sum-exp.
    """

    top_k: int = 2**16
    temperature: float = 1.0
    normalized: bool = False


class TeacherStore(TokenStore):
    """Records with a teacher's scores, of one or more shards."""

    kind = "teacher"

    def __init__(
        self,
        folders: Sequence[Path],
        chosen: np.ndarray | None = None,
        wanted: Wanted | None = None,
    ):
        """Open shards as one store.

        Args:
            folders, chosen: as for TokenStore.
            wanted: what to give of the scores; None for all, without a log-sum-exp.

        Raises:
            DataError: a shard is damaged, or was made without what is wanted.
        """
        super().__init__(folders, chosen)
        self.wanted = wanted or Wanted()
        self.k = min(self.wanted.top_k, *(meta["k"] for meta in self.metas))
        for folder, meta in zip(self.folders, self.metas, strict=True):
            _check(folder, meta, self.wanted)
        self._scores = [
            {
                name: map_array(folder, name, meta["tokens"] * width)
                for name, width in _score_arrays(meta).items()
            }
            for folder, meta in zip(self.folders, self.metas, strict=True)
        ]

    def __reduce__(self) -> Any:
        return type(self), (self.folders, self._chosen, self.wanted)

    def select(self, numbers: np.ndarray) -> "TeacherStore":
        chosen = numbers if self._chosen is None else self._chosen[numbers]
        return type(self)(self.folders, chosen, self.wanted)

    @property
    def fingerprint(self) -> str:
        """Equal where records, masks, teacher and what is taken of its scores are the same."""
        taught = [[meta["teacher"], meta["k"], self.k] for meta in self.metas]
        text = json.dumps([super().fingerprint, taught])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def scores(
        self, number: int, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The scores of a record's tokens from `start` to before `stop`.

        Returns:
            ids [n, k], values [n, k], and the log-sum-exp at the wanted temperature, [n], if it
            is wanted.
        """
        place = self._part[number]
        arrays, width = self._scores[place], self.metas[place]["k"]
        first = self._starts[number]
        rows = slice((first + start) * width, (first + stop) * width)
        ids, values = (arrays[n][rows].reshape(-1, width)[:, : self.k] for n in ("ids", "values"))
        if not self.wanted.normalized:
            return ids, values, None
        if self.wanted.temperature == 1:
            return ids, values, np.zeros(len(ids), np.float32)
        lse = arrays[_lse_name(self.wanted.temperature)]
        return ids, values, lse[first + start : first + stop]

    def pieces(self, ctx_len: int, overlong: str = "auto") -> "TeacherPieces":
        """As TokenStore.pieces; their batches are TeacherBatches."""
        from data.teacher_pieces import cut

        return cut(self, ctx_len, overlong)


def open_teacher(
    paths: str | Path | Sequence[str | Path], cache_dir: str, tokenizer: Tokenizer, wanted: Wanted
) -> TeacherStore:
    """The records of one or more folders of scores and .h5 files of RWKV-LM-RLHF.

    Raises:
        DataError: a path holds no scores, unfinished ones, another tokenizer's, or none that the
            run can use.
    """
    folders: list[Path] = []
    for path in split_paths(paths):
        if is_store(path):
            meta = read_meta(path, SHARDS)
            folders += [path / name for name in meta["shards"]]
        elif path.is_dir() and list(path.glob("shard-*")):
            raise DataError(
                f"{path}: is unfinished; call python -m data.make_teacher again with the same "
                "flags and it goes on"
            )
        elif path.suffix.lower() in H5_SUFFIXES and path.exists():
            folders.append(_converted(path, Path(cache_dir).expanduser(), tokenizer))
        else:
            raise DataError(
                f"--train_data_file {path}: holds no teacher's scores; make them with "
                "python -m data.make_teacher, or let the teacher run with --teacher_model"
            )
    if not folders:
        raise DataError("--train_data_file: names no file; --distillation needs a teacher's scores")
    store = TeacherStore(folders, None, wanted)
    store.check_tokenizer(tokenizer)
    return store


def write_shard(
    folder: Path,
    records: Iterable[Encoded],
    scores: Iterable[Scores],
    meta: dict[str, Any],
) -> dict[str, Any]:
    """Write records with their scores as a folder, all of it or nothing; return its meta.json.

    Args:
        folder: the shard.
        records: as for write_store.
        scores: of the records' tokens, end to end, cut anywhere.
        meta: what is to stand in meta.json; k, temperatures and normalized among it.

    Raises:
        DataError: the scores are not as many as the tokens.
    """
    with replacing(folder) as beside:
        whole = write_store(beside, records, {**meta, "kind": TeacherStore.kind})
        kinds: dict[str, Any] = {"ids": np.uint16, "values": np.float16}
        kinds |= {_lse_name(T): np.float32 for T in meta["temperatures"] if T != 1}
        rows = 0
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(ArrayWriter(beside / f"{name}.npy", kind))
                for name, kind in kinds.items()
            }
            for ids, values, lse in scores:
                files["ids"].append(ids.reshape(-1))
                files["values"].append(values.reshape(-1))
                for T, numbers in lse.items():
                    files[_lse_name(T)].append(numbers)
                rows += len(ids)
        if rows != whole["tokens"]:
            raise DataError(
                f"{folder}: {rows:,} scores for {whole['tokens']:,} tokens; make it again"
            )
    return whole


def finish(folder: Path, shards: Sequence[str], meta: dict[str, Any]) -> None:
    """Write the meta.json that makes complete shards a folder of scores."""
    metas = [read_meta(folder / name, TeacherStore.kind) for name in shards]
    counts = {key: sum(one[key] for one in metas) for key in ("records", "tokens", "scored")}
    content = {**meta, "format": FORMAT, "kind": SHARDS, **counts, "shards": list(shards)}
    with replacing(folder / META) as beside:
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def encoded(store: TokenStore, numbers: Sequence[int]) -> Encoded:
    """Records of a store as write_store takes them."""
    read = [store.record(number) for number in numbers]
    return Encoded(
        np.concatenate([tokens for tokens, _ in read]),
        np.concatenate([mask for _, mask in read]),
        store.lengths[list(numbers)],
        store.dialogue[list(numbers)],
        Counter(),
    )


def _check(folder: Path, meta: dict[str, Any], wanted: Wanted) -> None:
    """Stop where the scores lack what the run's divergence needs."""
    if not wanted.normalized:
        return
    if not meta["normalized"]:
        raise DataError(
            f"--train_data_file: {folder.name} has no log-sum-exp, as it comes from a file of "
            "RWKV-LM-RLHF; use --kd_loss renormalized, or make scores with python -m "
            "data.make_teacher"
        )
    if wanted.temperature not in (1, *meta["temperatures"]):
        known = ", ".join(f"{T:g}" for T in sorted({1.0, *meta["temperatures"]}))
        raise DataError(
            f"{folder}: was made for the temperatures {known}, --temperature is "
            f"{wanted.temperature:g}; use one of these, or make it again with "
            f"--temperature {wanted.temperature:g}"
        )


def _score_arrays(meta: dict[str, Any]) -> dict[str, int]:
    """The arrays of a shard beside those of its records, and their numbers a token."""
    lse = {_lse_name(T): 1 for T in meta["temperatures"] if T != 1}
    return {"ids": meta["k"], "values": meta["k"], **lse}


def _lse_name(temperature: float) -> str:
    return f"lse-{temperature:g}"


def _converted(path: Path, cache: Path, tokenizer: Tokenizer) -> Path:
    """The folder with a .h5 file's records and scores, made if need be."""
    from data.upstream_files import distillation_k, read_distillation_h5

    content = content_hash(path, cache)
    key = hashlib.blake2b(f"{FORMAT} {content} {tokenizer.fingerprint}".encode(), digest_size=10)
    folder = cache / f"{path.stem[:40]}-teacher-{key.hexdigest()}"
    with one_at_a_time(cache):
        if not is_store(folder):
            meta = {
                "tokenizer": tokenizer.name,
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "end_of_text": tokenizer.end_of_text,
                "template_fingerprint": "",
                "mask_prompt": False,
                "sources": [{"path": str(path), "content": content}],
                "teacher": content,
                "k": distillation_k(path),
                "temperatures": [],
                "normalized": False,
            }
            write_shard(
                folder,
                (records for records, _, _ in read_distillation_h5(path, tokenizer)),
                (
                    Scores(ids, values, {})
                    for _, ids, values in read_distillation_h5(path, tokenizer)
                ),
                meta,
            )
    return folder
