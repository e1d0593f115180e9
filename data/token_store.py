"""Tokenized records on disk: a folder of memory-mapped arrays.

    tokens.npy    uint16, all records end to end
    mask.npy      bool, for each token whether it is scored as a target; false for a record's first
    ends.npy      int64, for each record the index after its last token
    scored.npy    int64, for each record its scored targets
    dialogue.npy  bool, for each record whether it has turns; false for plain text
    meta.json     counts, tokenizer, template, sources

Stores of other kinds add arrays, by token or by record, and name them in their class.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from data.records import DataError
from rwkv.errors import InputError
from rwkv.files import replacing
from rwkv.tokenizer import Tokenizer

if TYPE_CHECKING:
    from data.pieces import Pieces
    from data.tokenizing import Encoded

FORMAT = 1
META = "meta.json"


class TokenStore:
    """Records of one or more folders, or some of them.

    lengths: tokens of each record, int64.
    by_record: the `record_arrays` by name, a value a record.
    metas: what each folder's meta.json says.
    """

    kind = "sft"
    token_arrays: tuple[str, ...] = ("tokens", "mask")
    record_arrays: tuple[str, ...] = ("scored", "dialogue")

    def __init__(self, folders: Sequence[Path], chosen: np.ndarray | None = None):
        """Open folders as one store.

        Args:
            folders: made by `write_store`.
            chosen: numbers of the records to keep, counted over all folders; None for all.

        Raises:
            DataError: a folder is missing, damaged, of another version or another kind.
        """
        self.folders, self._chosen = [Path(folder) for folder in folders], chosen
        self.metas = [read_meta(folder, self.kind) for folder in self.folders]
        self._parts = [
            {name: map_array(folder, name, meta["tokens"]) for name in self.token_arrays}
            for folder, meta in zip(self.folders, self.metas, strict=True)
        ]
        ends = self._per_record("ends")
        starts = [np.concatenate([[0], one[:-1]]) for one in ends]
        counts = [meta["records"] for meta in self.metas]
        part = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        keep = slice(None) if chosen is None else chosen
        self._part, self._starts = part[keep], _joined(starts)[keep]
        self.lengths = _joined(ends)[keep] - self._starts
        self.by_record = {
            name: _joined(self._per_record(name))[keep] for name in self.record_arrays
        }

    @property
    def scored(self) -> np.ndarray:
        """Scored targets of each record, int64."""
        return self.by_record["scored"]

    @property
    def dialogue(self) -> np.ndarray:
        """For each record whether it has turns, bool."""
        return self.by_record["dialogue"]

    def _per_record(self, name: str) -> list[np.ndarray]:
        pairs = zip(self.folders, self.metas, strict=True)
        return [map_array(folder, name, meta["records"]) for folder, meta in pairs]

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[type, tuple[list[Path], np.ndarray | None]]:
        return type(self), (self.folders, self._chosen)  # another process maps the files itself

    def record(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask of a record; mask[t] says that token t is scored as a target."""
        tokens, mask = self.read(number, 0, int(self.lengths[number]))
        return tokens, mask

    def read(self, number: int, start: int, stop: int) -> tuple[np.ndarray, ...]:
        """The `token_arrays` of a record from token `start` to before `stop`."""
        part, first = self._parts[self._part[number]], self._starts[number]
        return tuple(part[name][first + start : first + stop] for name in self.token_arrays)

    def select(self, numbers: np.ndarray) -> "TokenStore":
        """A store of these records only, in this order, over the same files."""
        chosen = numbers if self._chosen is None else self._chosen[numbers]
        return type(self)(self.folders, chosen)

    @property
    def fingerprint(self) -> str:
        """Equal where the records and their masks are the same."""
        keys = ("records", "tokens", "tokenizer_fingerprint", "template_fingerprint", "mask_prompt")
        made_of = [
            [[source["content"] for source in meta["sources"]], *(meta[key] for key in keys)]
            for meta in self.metas
        ]
        found = hashlib.blake2b(json.dumps(made_of).encode(), digest_size=8)
        if self._chosen is not None:
            found.update(np.ascontiguousarray(self._chosen, np.int64).data)
        return found.hexdigest()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Stop where the tokens are another tokenizer's.

        Raises:
            DataError: names the folder and both tokenizers.
        """
        for folder, meta in zip(self.folders, self.metas, strict=True):
            if meta["tokenizer_fingerprint"] != tokenizer.fingerprint:
                raise DataError(
                    f"{folder}: was made with tokenizer {meta['tokenizer']} "
                    f"({meta['tokenizer_fingerprint']}), the model's is {tokenizer.name} "
                    f"({tokenizer.fingerprint}); make it again with --tokenizer {tokenizer.name}"
                )

    def pieces(self, ctx_len: int, overlong: str = "auto") -> "Pieces":
        """What of each record is trained where a row has room for `ctx_len` inputs."""
        from data.pieces import cut  # torch, which tokenizing processes do without

        return cut(self, ctx_len, overlong)


def open_folder(path: Path) -> TokenStore:
    """The token store in that folder."""
    return TokenStore([path])


def is_store(path: Path) -> bool:
    return (path / META).is_file()


def split(store: TokenStore, fraction: float, seed: int) -> tuple[TokenStore, TokenStore]:
    """Training and validation records: a random `fraction` of the records is held out.

    Both keep the records' order. At least one record lands on each side.

    Raises:
        InputError: the fraction is outside (0, 1), or there are fewer than two records.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--val_fraction {fraction}: must be above 0 and below 1; 0.01 is usual")
    if len(store) < 2:
        raise InputError(
            f"--val_fraction {fraction}: there is only {len(store)} record to split; drop the flag"
        )
    count = min(max(round(len(store) * fraction), 1), len(store) - 1)
    order = np.random.default_rng([seed, 1]).permutation(len(store))
    return store.select(np.sort(order[count:])), store.select(np.sort(order[:count]))


class Records(NamedTuple):
    """Records that are to be written.

    arrays: by name, a value for each token or each record of these; "tokens" is one of them.
    lengths: tokens of each record.
    counts: what meta.json adds up over all records, by name.
    notes: what was left out or added, counted under words for the user.
    """

    arrays: dict[str, np.ndarray]
    lengths: np.ndarray
    counts: dict[str, int]
    notes: Counter[str]


def write_store(folder: Path, chunks: Iterable["Encoded"], meta: dict[str, Any]) -> dict[str, Any]:
    """Write encoded records as a folder, all of it or nothing; return its meta.json.

    Args:
        folder: the folder to make; one that is there is replaced.
        chunks: the records; at least one.
        meta: what is to stand in meta.json besides counts.

    Raises:
        DataError: there is no record.
    """

    def records() -> Iterator[Records]:
        for chunk in chunks:
            if not len(chunk.lengths):
                continue
            starts = np.cumsum(chunk.lengths) - chunk.lengths
            scored = np.add.reduceat(chunk.mask, starts, dtype=np.int64)
            arrays = {"tokens": chunk.tokens, "mask": chunk.mask}
            arrays |= {"scored": scored, "dialogue": chunk.dialogue}
            yield Records(arrays, chunk.lengths, {"scored": int(scored.sum())}, chunk.notes)

    kinds = {"tokens": np.uint16, "mask": np.bool_, "scored": np.int64, "dialogue": np.bool_}
    return write_arrays(folder, records(), kinds, {"kind": TokenStore.kind, **meta})


def write_arrays(
    folder: Path, chunks: Iterable[Records], kinds: dict[str, Any], meta: dict[str, Any]
) -> dict[str, Any]:
    """Write records of any kind of store as a folder, all of it or nothing; return its meta.json.

    Args:
        folder: the folder to make; one that is there is replaced.
        chunks: the records; at least one.
        kinds: the dtype of each array; ends.npy is made beside them.
        meta: what is to stand in meta.json besides counts.

    Raises:
        DataError: there is no record.
    """
    counts, notes = Counter[str](), Counter[str]()
    records = tokens = 0
    with replacing(folder) as beside:
        beside.mkdir()
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(ArrayWriter(beside / f"{name}.npy", kind))
                for name, kind in {**kinds, "ends": np.int64}.items()
            }
            for chunk in chunks:
                notes += chunk.notes
                if not len(chunk.lengths):
                    continue
                ends = np.cumsum(chunk.lengths) + tokens
                for name, values in {**chunk.arrays, "ends": ends}.items():
                    files[name].append(values)
                counts.update(chunk.counts)
                records, tokens = records + len(ends), int(ends[-1])
        if not records:
            names = ", ".join(source["path"] for source in meta.get("sources", [])) or str(folder)
            left_out = "".join(f"; {count:,} {what}" for what, count in notes.items())
            raise DataError(f"{names}: has no records to train on{left_out}; is it the right file?")
        meta = {
            "format": FORMAT,
            "records": records,
            "tokens": tokens,
            **counts,
            "notes": dict(notes),
            **meta,
        }
        (beside / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
    return meta


class ArrayWriter:
    """A .npy file of one dimension that grows: its header is written again at the end."""

    def __init__(self, path: Path, dtype: Any):
        self.path, self.dtype, self.count = path, np.dtype(dtype), 0
        self._file: BinaryIO = path.open("wb")
        self._header()
        self._start = self._file.tell()

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.count,),
            },
        )

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.count += len(values)

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._header()
                assert self._file.tell() == self._start  # numpy leaves room for a longer shape


def read_meta(folder: Path, kind: str) -> dict[str, Any]:
    """What meta.json of a store says.

    Raises:
        DataError: it is missing or damaged, or of another version or kind.
    """
    if not is_store(folder):
        raise DataError(f"{folder}: is no token store (it has no {META}); check the path")
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        version, found = meta["format"], meta["kind"]
        int(meta["records"]), int(meta["tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / META}: is damaged ({error!r}); make the store again") from None
    if version != FORMAT:
        raise DataError(
            f"{folder}: has format {version}, this program reads {FORMAT}; make the store again"
        )
    if found != kind:
        raise DataError(
            f"{folder}: holds {found!r} records, {kind!r} are needed here; name another store"
        )
    return meta


def map_array(folder: Path, name: str, length: int) -> np.ndarray:
    """Map an array of a store.

    Raises:
        DataError: the file is missing, damaged, or of another length than meta.json says.
    """
    path = folder / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the store again") from None
    if array.shape != (length,):
        raise DataError(
            f"{path}: has shape {list(array.shape)}, {META} says [{length}]; make the store again"
        )
    return array


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
