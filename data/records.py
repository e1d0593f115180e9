"""Files of records, read one by one, so that every error names file and line.

`.jsonl`: an object a line. `.json`: a list, or objects one after another. `.csv`: columns named
in the first line. Each may be gzipped (`.gz`) and may begin with a byte order mark.
"""

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rwkv import plain_text
from rwkv.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv")


class DataError(InputError):
    """An input file is wrong; the message names the file, the line and the mend."""


class RawRecord(NamedTuple):
    """A record before it is parsed.

    line: number of its first line, from 1.
    value: a line of JSON in bytes (so that parsing can run in another process), or the value.
    size: its bytes or characters.
    """

    line: int
    value: Any
    size: int


class RecordFile:
    """The records of one file. Iterate once; `position` tells how far that has come.

    Raises:
        DataError: the file is missing, of an unknown kind, or not what its name says.
    """

    def __init__(self, path: Path):
        self.path = path
        self.kind = record_suffix(path)
        if not self.kind:
            raise DataError(
                f"{path}: unknown kind of file; give {', '.join(SUFFIXES)} (or the same with "
                ".gz), .h5, or a folder made by python -m data.make_sft"
            )
        check_file(path)
        self.size = path.stat().st_size
        self._raw: BinaryIO | None = None

    def position(self) -> int:
        """Bytes of the file read so far, of `size`."""
        return self._raw.tell() if self._raw and not self._raw.closed else 0

    def __iter__(self) -> Iterator[RawRecord]:
        reader = {".jsonl": self._json_lines, ".json": self._json_values, ".csv": self._csv_rows}
        with self.path.open("rb") as raw:
            self._raw = raw
            zipped = self.path.suffix.lower() == ".gz"
            stream: Any = gzip.GzipFile(fileobj=raw) if zipped else raw
            try:
                yield from reader[self.kind](stream)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(
                    f"{self.path}: not a whole gzip file ({error}); fetch or make it again"
                ) from None

    def _json_lines(self, stream: BinaryIO) -> Iterator[RawRecord]:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield RawRecord(number, line, len(line))

    def _json_values(self, stream: BinaryIO) -> Iterator[RawRecord]:
        with _as_data_error():
            text = plain_text.decode(self.path, stream.read())
        decoder, line, counted = json.JSONDecoder(), 1, 0
        at = _skip_space(text, 0)
        in_list = text.startswith("[", at)
        if in_list:
            at = _skip_space(text, at + 1)
        while at < len(text) and not (in_list and text[at] == "]"):
            line, counted = line + text.count("\n", counted, at), at
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:  # which counts the lines of all text
                raise DataError(str(plain_text.not_json(self.path, 1, error))) from None
            except (ValueError, RecursionError) as error:
                raise DataError(str(plain_text.not_json(self.path, line, error))) from None
            yield RawRecord(line, value, end - at)
            at = _skip_space(text, end)
            if in_list and text[at : at + 1] not in (",", "]"):
                line += text.count("\n", counted, at)
                raise DataError(
                    f"{self.path}:{line}: not JSON (expected ',' or ']'); mend that line"
                )
            if in_list and text[at] == ",":
                at = _skip_space(text, at + 1)
        if in_list and at >= len(text):
            raise DataError(f"{self.path}: not JSON (the list has no end); is the file whole?")
        if in_list and (behind := _skip_space(text, at + 1)) < len(text):
            line += text.count("\n", counted, behind)
            raise DataError(
                f"{self.path}:{line}: not JSON (something follows the list); write one list"
            )

    def _csv_rows(self, stream: BinaryIO) -> Iterator[RawRecord]:
        csv.field_size_limit(2**31 - 1)
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        rows = csv.reader(text, strict=True)
        header, line = None, 1
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(
                    f"{self.path}:{line}: not CSV ({error}); mend that line, or is the file whole?"
                ) from None
            except UnicodeDecodeError as error:
                where = f"{self.path}: after line {line}"
                raise DataError(str(plain_text.not_utf8(where, error))) from None
            if row is None:
                return
            if header is None:
                header = [name.strip() for name in row]
                if len(set(header)) != len(header) or "" in header:
                    raise DataError(
                        f"{self.path}:1: the first line must name every column, each once; it is "
                        f"{','.join(header)!r}"
                    )
            elif row:
                if len(row) != len(header):
                    raise DataError(
                        f"{self.path}:{line}: has {len(row)} fields, the first line names "
                        f"{len(header)} columns; quote fields that hold a comma"
                    )
                yield RawRecord(line, dict(zip(header, row, strict=True)), sum(map(len, row)))
            line = rows.line_num + 1


def parse_json(path: Path, raw: RawRecord) -> Any:
    """The value of a raw record.

    Raises:
        DataError: the line is no JSON, or not UTF-8.
    """
    if not isinstance(raw.value, bytes):
        return raw.value
    with _as_data_error():
        text = plain_text.decode(path, raw.value, raw.line).rstrip()
        return plain_text.parse_json(path, text, raw.line)


def record_suffix(path: Path) -> str:
    """Which of SUFFIXES the file has, less any .gz; "" for none."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def check_file(path: Path) -> None:
    """Stop where `path` is no file, or an empty one."""
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise DataError(
            f"{path}: a folder, but not one made by python -m data.make_sft (it has no meta.json); "
            "name the files in it, with commas between them"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; write it again, or name another")


@contextlib.contextmanager
def _as_data_error() -> Iterator[None]:
    """What is wrong with a data file's text, as a DataError."""
    try:
        yield
    except InputError as error:
        raise DataError(str(error)) from None


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
