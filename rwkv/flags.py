"""From frozen dataclasses to command-line flags and back to typed objects.

A folder declares its flags as a frozen dataclass of `flag` fields beside the code that reads
them. `parse` makes one parser of such classes and returns one object of each, so that nobody
passes a namespace around.
"""

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from rwkv.errors import InputError

T = TypeVar("T")


def flag(
    default: Any, help: str, *, choices: Sequence[Any] | None = None, also: tuple[str, ...] = ()
) -> Any:
    """A dataclass field that becomes the flag `--<field name>`.

    Args:
        default: its value when the flag is absent.
        help: one sentence for --help.
        choices: the values allowed; None for any of the field's type.
        also: of a boolean flag, the words that it takes beside 0 and 1.
    """
    metadata = {"help": help, "choices": choices, "also": also}
    return dataclasses.field(default=default, metadata=metadata)


class OnOff:
    """Reads 1, 0, true, false, yes, no, on or off; the type of boolean flags.

    Args:
        also: words beside these, which are kept as they are and count as on.
    """

    WORDS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
        ("0", "false", "no", "off"), False
    )

    def __init__(self, also: tuple[str, ...] = ()):
        self.also = also

    def __call__(self, text: object) -> bool | str:
        if str(text) in self.also:
            return str(text)
        value = self.WORDS.get(str(text).lower())
        if value is None:
            words = "".join(f" nor {word}" for word in self.also)
            raise ValueError(f"{text!r} is neither 1 nor 0{words}")
        return value

    def __repr__(self) -> str:  # shown by --help
        return " or ".join(("0", "1", *self.also))


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
    parser = _parser(classes, program, description)
    try:
        values = parser.parse_args(argv)
    except Exception as error:
        if type(error).__name__ != "ArgumentError":
            raise
        raise InputError(" ".join(str(error).split())) from None
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
            also = field.metadata["also"]
            text = field.metadata["help"].replace("%", "%%")
            if kind is bool or also:
                arguments.add_argument(
                    f"--{field.name}",
                    type=OnOff(also),
                    nargs="?",
                    const=True,
                    metavar="|".join(("0", "1", *also)),
                    default=field.default,
                    help=text,
                )
            elif choices:
                arguments.add_argument(
                    f"--{field.name}",
                    type=kind,
                    choices=list(choices),
                    default=field.default,
                    help=text,
                )
            else:
                metavar = "TEXT" if kind is str else getattr(kind, "__name__", str(kind)).upper()
                arguments.add_argument(
                    f"--{field.name}",
                    type=kind,
                    metavar=metavar if "|" not in metavar else None,
                    default=field.default,
                    help=text,
                )
    return parser


def _check_names(argv: Sequence[str], known: list[str]) -> None:
    """Stop at a flag that nobody declared, with the nearest one that somebody did."""
    for word in argv:
        name = word.removeprefix("--").partition("=")[0]
        if not word.startswith("--") or name in (*known, "help", "config", "print_config"):
            continue
        near = difflib.get_close_matches(name, [*known, "config", "print_config"], n=1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the known ones"
        raise InputError(f"--{name}: no such flag; {hint}")
