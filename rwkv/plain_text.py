"""Text and JSON from outside: what they say, or an error that names file, line and mend."""

import json
import reprlib
from pathlib import Path
from typing import Any

from rwkv.errors import InputError

MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK": "a zip archive", b"\x1f\x8b": "gzip"}


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, less a byte order mark.

    Raises:
        InputError: it is missing, a folder, or not UTF-8.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    return decode(path, path.read_bytes())


def decode(path: Path, data: bytes, line: int = 1) -> str:
    """The text of bytes in UTF-8, less a byte order mark.

    Args:
        path: where they stand.
        data: whole lines of that file.
        line: the number of the first of them, from 1.

    Raises:
        InputError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise not_utf8(f"{path}:{line}", error) from None


def not_utf8(where: str, error: UnicodeDecodeError) -> InputError:
    """The error for a file that is not UTF-8; it says what the file looks like instead."""
    kind = MARKS.get(error.object[:2], "") if error.start < 2 else ""
    found = f"byte 0x{error.object[error.start]:02x}{'; it looks like ' + kind if kind else ''}"
    return InputError(f"{where}: not UTF-8 ({found}); save the file as UTF-8")


def parse_json(path: Path, text: str, line: int = 1, *, once: bool = False) -> Any:
    """The value of JSON.

    Args:
        path: where the text stands.
        text: lines of that file.
        line: the number of the first of them, from 1.
        once: stop at an object that has a key twice, of which JSON's readers keep the last.

    Raises:
        InputError: it is no JSON, or more than Python reads, or has a key twice.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(
                    f"{path}: {key!r} is there twice in one object, as "
                    f"{reprlib.repr(found[key])} and {reprlib.repr(value)}; keep one of them"
                )
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=checked if once else None)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise not_json(path, line, error) from None


def not_json(path: Path, line: int, error: ValueError | RecursionError) -> InputError:
    """The error for text that begins at a line of a file and is no JSON that Python reads."""
    if not isinstance(error, json.JSONDecodeError):  # a number of 5,000 digits, 1,000 brackets
        return InputError(f"{path}:{line}: not JSON that can be read ({error}); mend that line")
    line += error.lineno - 1
    if "\0" in error.doc:
        return InputError(f"{path}:{line}: has NUL characters, as UTF-16 has; save it as UTF-8")
    return InputError(
        f"{path}:{line}: not JSON ({error.msg} at column {error.colno}); mend that line"
    )
