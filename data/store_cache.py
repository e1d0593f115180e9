"""Open training files as one token store, tokenizing each the first time only.

A tokenized file is kept in the cache under the hash of its content, of the template, of the
tokenizer and of what else decides its tokens, so a change of any of them makes it anew.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.progress import Progress
from data.records import DataError, check_file, record_suffix
from data.token_store import FORMAT, TokenStore, is_store, write_store
from data.tokenizing import Encoded, Recipe, encode_file, processor_count
from data.upstream_files import read_sft_h5
from rwkv.errors import InputError
from rwkv.files import remove, replacing
from rwkv.templates import load_template
from rwkv.tokenizer import Tokenizer

H5_SUFFIXES = (".h5", ".hdf5")
READING = 2  # raised where records come to give other tokens: what the cache has is made again
SETTLED_SECONDS = 2.0  # a file changed later than this before its hash was taken may change unseen


@dataclass(frozen=True)
class StoreSettings:
    """What decides the tokens and masks of a raw file, as in DataFlags."""

    template: str = "auto"
    turn_end: str = ""
    mask_prompt: bool = True
    cache_dir: str = "~/.cache/rwkv-lm-rlhf"


class StoreKind(NamedTuple):
    """How files become a store of one kind.

    suffixes: endings of the files it is made of, beside those of records.
    masks: whether --mask_prompt is asked which tokens are scored; else prompts never are.
    encode: (file, recipe, tokenizer, processes) -> encoded records.
    write: (folder, encoded records, meta) -> meta.json of the folder that it makes.
    open: the store's class.
    """

    suffixes: tuple[str, ...]
    masks: bool
    encode: Callable[[Path, Recipe, Tokenizer, int | None], Iterator[Any]]
    write: Callable[[Path, Iterable[Any], dict[str, Any]], dict[str, Any]]
    open: type[TokenStore]


def open_store(
    paths: str | Path | Sequence[str | Path],
    flags: Any,
    tokenizer: Tokenizer,
    kind: StoreKind | None = None,
) -> TokenStore:
    """The records of one or more files and folders, one after another.

    Args:
        paths: files of records, .h5 files, or folders made by data.make_sft; one string may name
            several with commas between them.
        flags: a DataFlags or StoreSettings.
        tokenizer: the model's.
        kind: of the store; None for SFT.

    Raises:
        DataError: a file is missing, empty or wrong, or a folder is another tokenizer's.
        InputError: the template or the cache cannot be used.
    """
    kind = kind or SFT
    template = load_template(flags.template, tokenizer, flags.turn_end or None)
    recipe = Recipe(tokenizer.name, template, bool(flags.mask_prompt) or not kind.masks)
    cache = Path(flags.cache_dir).expanduser()
    found = split_paths(paths)
    if not found:
        raise InputError("--train_data_file: names no file; write paths with commas between them")
    folders = [
        path if is_store(path) else _cached(path, cache, recipe, tokenizer, kind) for path in found
    ]
    store = kind.open(folders)
    store.check_tokenizer(tokenizer)
    return store


def split_paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The paths in a flag's value; a comma parts them unless a file of that name exists."""
    if isinstance(paths, (str, Path)):
        whole = Path(paths).expanduser()
        paths = [paths] if whole.exists() else str(paths).split(",")
    stripped = [path.strip() if isinstance(path, str) else path for path in paths]
    return [Path(path).expanduser() for path in stripped if str(path)]


def encode_any(
    path: Path, recipe: Recipe, tokenizer: Tokenizer, workers: int | None = None
) -> Iterator[Encoded]:
    """Yield the encoded records of a file of any kind, with progress on stderr if it takes long."""
    progress = Progress(f"tokenizing {path.name}")
    try:
        if path.suffix.lower() in H5_SUFFIXES:
            yield from read_sft_h5(path, tokenizer, progress)
        else:
            yield from encode_file(path, recipe, workers or processor_count(), progress)
    finally:
        progress.finish()


SFT = StoreKind(H5_SUFFIXES, True, encode_any, write_store, TokenStore)


def build_store(
    folder: Path,
    paths: Iterable[Path],
    recipe: Recipe,
    tokenizer: Tokenizer,
    workers: int | None = None,
    kind: StoreKind = SFT,
) -> dict[str, Any]:
    """Tokenize files into a folder, all of it or nothing; return its meta.json.

    What an earlier build of the same folder left when it was killed is removed.
    """
    paths = list(paths)
    for left in folder.parent.glob(f".{folder.name}.*.part"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and not _alive(int(process)):
            remove(left)
    sources = [{"path": str(path), "content": content_hash(path)} for path in paths]
    meta = {
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "end_of_text": tokenizer.end_of_text,
        "template": recipe.template.name,
        "template_fingerprint": recipe.template.fingerprint,
        "turn_end": recipe.template.turn_end,
        "mask_prompt": recipe.mask_prompt,
        "sources": sources,
    }
    chunks = (chunk for path in paths for chunk in kind.encode(path, recipe, tokenizer, workers))
    return kind.write(folder, chunks, meta)


def _cached(path: Path, cache: Path, recipe: Recipe, tokenizer: Tokenizer, kind: StoreKind) -> Path:
    """The folder with the tokens of a file, made if need be."""
    if not record_suffix(path) and path.suffix.lower() not in kind.suffixes and path.exists():
        check_file(path)
    key = _key(path, content_hash(path, cache), recipe, tokenizer, kind)
    folder = cache / f"{path.name.split('.')[0][:40]}-{key}"
    if _usable(folder, kind):
        return folder
    with one_at_a_time(cache):
        if not _usable(folder, kind):  # another process may have made it meanwhile
            build_store(folder, [path], recipe, tokenizer, None, kind)
    return folder


def _usable(folder: Path, kind: StoreKind) -> bool:
    try:
        return is_store(folder) and len(kind.open([folder])) > 0
    except DataError:
        return False


def _key(path: Path, content: str, recipe: Recipe, tokenizer: Tokenizer, kind: StoreKind) -> str:
    suffix = record_suffix(path) or path.suffix.lower()
    settings = [recipe.template.fingerprint, tokenizer.fingerprint, recipe.mask_prompt]
    text = json.dumps(
        [FORMAT, READING, kind.open.kind, content, suffix, path.suffix.lower() == ".gz", *settings]
    )
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def content_hash(path: Path, cache: Path | None = None) -> str:
    """Hash of a file's bytes; with `cache`, remembered for as long as the file looks the same."""
    check_file(path)
    stat = path.stat()
    look = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    memo = None
    if cache is not None:
        name = hashlib.blake2b(str(path.resolve()).encode(), digest_size=10).hexdigest()
        memo = cache / "hashes" / f"{name}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(memo.read_text())
            if known["look"] == look:
                return known["hash"]
    started = time.time()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    if memo is not None and started - stat.st_mtime > SETTLED_SECONDS:
        with contextlib.suppress(InputError), replacing(memo) as beside:
            beside.write_text(json.dumps({"look": look, "hash": found}))
    return found


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def one_at_a_time(folder: Path, flag: str = "--cache_dir") -> Iterator[None]:
    """Hold a folder's lock, so that the ranks of one machine make what is in it once.

    flag: that names the folder, for the error of one that cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows; there each process makes its own copy and the last stays
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(
            f"{flag} {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(f"{folder}: waiting for another process that writes there\n")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
