"""From frozen dataclasses to command-line flags and back to typed objects.

A folder declares its flags as a frozen dataclass of `flag` fields beside the code that reads
them. `parse` makes one parser of such classes and returns one object of each, so that nobody
passes a namespace around.
"""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rwkv.errors import InputError
from rwkv.plain_text import read_text

T = TypeVar("T")


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    within: str = "",
    also: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that becomes the flag `--<field name>`.

    Args:
        default: its value when the flag is absent.
        help: one sentence for --help.
        choices: the values allowed; None for any of the field's type.
        within: the interval of a number, such as "[0, 1)" or "[1, inf)"; "" for any.
        also: of a boolean flag, the words that it takes beside 0 and 1.
    """
    metadata = {"help": help, "choices": choices, "within": within, "also": also}
    return dataclasses.field(default=default, metadata=metadata)


class Reader:
    """The type of a flag: reads what stands behind it, or says why that cannot be.

    Args:
        name, kind, default: of the field.
        choices, within, also: see `flag`.
    """

    ON_OFF = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
        ("0", "false", "no", "off"), False
    )

    def __init__(self, name: str, kind: Any, default: Any, metadata: Mapping[str, Any]):
        self.name, self.default = name, default
        self.choices, self.within = metadata["choices"], metadata["within"]
        self.also = metadata["also"]
        self.kind = bool if self.also else kind

    def __call__(self, given: object) -> Any:
        text = str(given)
        if self.kind is bool:
            if text in self.also:
                return text
            if text.lower() in self.ON_OFF:
                return self.ON_OFF[text.lower()]
            self._stop(text, f"is not {' or '.join(('1', '0', *self.also))}; write one")
        value: Any
        try:
            value = self.kind(text)
        except ValueError:
            value = float("nan")
        if value != value or value in (float("inf"), -float("inf")):
            kind = "whole number" if self.kind is int else "number"
            self._stop(text, f"is no {kind}; write one")
        if self.choices and value not in self.choices:
            words = [str(choice) for choice in self.choices if choice != ""]
            near = difflib.get_close_matches(text, words, n=1)
            hint = f"did you mean {near[0]}?" if near else "take one of them"
            self._stop(text, f"is not one of {', '.join(words)}; {hint}")
        if self.within and not is_within(value, self.within):
            self._stop(text, f"must be {in_words(self.within)}; it is {self.default} if not given")
        return value

    def _stop(self, text: str, what: str) -> NoReturn:
        raise argparse.ArgumentTypeError(f"--{self.name} {text}: {what}")

    def __repr__(self) -> str:  # shown by --help
        if self.kind is bool:
            return " or ".join(("0", "1", *self.also))
        return str(self.kind.__name__)


def is_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    return (low < value or (low == value and interval[0] == "[")) and (
        value < high or (value == high and interval[-1] == "]")
    )


def in_words(interval: str) -> str:
    """An interval as a message has it: "at least 1", "above 0", "from 0 to below 1"."""
    low, high = (f"{float(end):g}" for end in interval[1:-1].split(","))
    if high == "inf":
        return f"at least {low}" if interval[0] == "[" else f"above {low}"
    if interval[0] == "(":
        return f"above {low} and {'below' if interval[-1] == ')' else 'at most'} {high}"
    return f"from {low} to {'below ' if interval[-1] == ')' else ''}{high}"


class Settings(dict[type, Any]):
    """One object of each class of flags, found by its class: `settings[DataFlags]`."""

    def __getitem__(self, key: type[T]) -> T:
        return super().__getitem__(key)

    def as_flags(self) -> dict[str, Any]:
        """Every flag and its value, flat, in the order of --help."""
        return {k: v for group in self.values() for k, v in dataclasses.asdict(group).items()}


def parse(
    argv: Sequence[str],
    classes: Sequence[type],
    *,
    program: str,
    description: str,
) -> Settings:
    """Read the command line into one object a class.

    Args:
        argv: the words after the program's name.
        classes: frozen dataclasses of `flag` fields.
        program, description: for --help.

    Raises:
        InputError: a flag is unknown, or its value is not of its type.
    """
    known = [field.name for group in classes for field in dataclasses.fields(group)]
    _check_names(argv, known)
    argv = with_minus(argv)
    config = _config_file(argv)
    parser = _parser(classes, program, description)
    try:
        values = parser.parse_args(argv)
    except argparse.ArgumentTypeError as error:  # of a value in the --config file
        raise InputError(f"{config}: {error}") from None
    except Exception as error:
        if type(error).__name__ != "ArgumentError":
            raise
        raise InputError(_in_one_line(str(error), config, known)) from None
    objects = Settings()
    for group in classes:
        fields = dataclasses.fields(group)
        objects[group] = group(**{field.name: values[field.name] for field in fields})
    return objects


def _parser(classes: Sequence[type], program: str, description: str) -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog=program, description=description, exit_on_error=False, default_env=False
    )
    parser.add_argument("--config", action="config", help="read flags from a YAML file")
    for group in classes:
        arguments = parser.add_argument_group((group.__doc__ or group.__name__).splitlines()[0])
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            kind, choices = hints[field.name], field.metadata["choices"]
            read = Reader(field.name, kind, field.default, field.metadata)
            text = field.metadata["help"].replace("%", "%%")
            options: dict[str, Any] = {"type": read, "default": field.default, "help": text}
            if read.kind is bool:
                options |= {
                    "nargs": "?",
                    "const": True,
                    "metavar": "|".join(("0", "1", *read.also)),
                }
            elif choices:
                options["metavar"] = f"{{{','.join(map(str, choices))}}}"
            else:
                options["metavar"] = "TEXT" if kind is str else kind.__name__.upper()
            arguments.add_argument(f"--{field.name}", **options)
    return parser


def _check_names(argv: Sequence[str], known: list[str]) -> None:
    """Stop at a flag that nobody declared, with the nearest one that somebody did."""
    for word in argv:
        name = word.removeprefix("--").partition("=")[0]
        if not word.startswith("--") or name in (*known, "help", "config", "print_config"):
            continue
        raise InputError(_no_such_flag(name, known))


def with_minus(argv: Sequence[str]) -> list[str]:
    """The words, with `--name -3GB` as `--name=-3GB`: argparse would take it for two flags."""
    words: list[str] = []
    for word in argv:
        valued = re.match(r"-[^-]", word) and word != "-h"
        if valued and words and re.fullmatch(r"--\w+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _config_file(argv: Sequence[str]) -> str:
    """The file of --config, or "" without one; one that cannot be read stops here."""
    path = ""
    for word, behind in pairwise([*argv, ""]):
        if word == "--config" or word.startswith("--config="):
            path = behind if word == "--config" else word.partition("=")[2]
            read_text(Path(path))
    return path


def _in_one_line(text: str, config: str, known: list[str]) -> str:
    """What argparse or jsonargparse found wrong, as our messages are written.

    Args:
        text: their message.
        config: the file of --config, or "".
        known: names of the flags.
    """
    text = " ".join(text.split())
    if found := re.search(r"--\w+ .*: (?:is|must be) .*; .*", text):
        return found.group()
    if found := re.fullmatch(r"argument (--\w+): expected one argument", text):
        return f"{found.group(1)}: has no value; write one behind it"
    if found := re.fullmatch(r"unrecognized arguments: (.*)", text):
        return f"{found.group(1)!r}: belongs to no flag; --help lists them"
    if found := re.search(r"Option '(\w+)' is not accepted", text):
        return f"{config}: {_no_such_flag(found.group(1), known)}"
    return f"{config or 'flags'}: {text}; --print_config shows how such a file is written"


def _no_such_flag(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, [*known, "config", "print_config"], n=1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists the known ones"
    return f"--{name}: no such flag; {hint}"
