"""What every command shares: flags read, names checked, errors on one line, exit statuses."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rwkv.errors import InputError, RunError
from rwkv.flags import Reader, with_minus
from rwkv.names import check_names


def run(main: Callable[[], int]) -> int:
    """Run a command's `main` and return its exit status.

    0 or what main returns; 2 for an InputError and 1 for a RunError, their message printed; 130 for
    Ctrl-C, 141 when the reader of a pipe went away.
    """
    try:
        check_names()
        return main()
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def say(text: str) -> None:
    """Report to the person who started the run; of several processes the first one speaks."""
    launched = {os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK")}
    if launched == {"0"}:
        print(text, file=sys.stderr)  # noqa: T201


class Switch(argparse.Action):
    """A flag that is 0 or 1, or 1 with nothing behind it, as those of train.py."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any):
        kinds: dict[str, Any] = {"choices": None, "within": "", "also": ()}
        read = Reader(dest, bool, False, kinds)
        options |= {"nargs": "?", "const": True, "default": False, "type": read, "metavar": "0|1"}
        super().__init__(option_strings, dest, **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse's parser, with our errors; flags are written out, and switches take 0 or 1."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.register("action", "store_true", Switch)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, and what follows a flag with one dash is its value."""
        return super().parse_known_args(
            with_minus(sys.argv[1:] if args is None else args), namespace
        )

    def error(self, message: str) -> NoReturn:
        """Stop with what argparse found wrong, as our messages are written.

        Raises:
            InputError: always.
        """
        raise InputError(self._in_our_words(message))

    def _in_our_words(self, message: str) -> str:
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: '(.*)'", message):
            kind = "whole number" if found.group(2) == "int" else "number"
            return f"{found.group(1)} {found.group(3)}: is no {kind}; write one"
        if found := re.fullmatch(
            r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", message
        ):
            name, given, words = (part.replace("'", "") for part in found.groups())
            near = difflib.get_close_matches(given, words.split(", "), n=1)
            hint = f"did you mean {near[0]}?" if near else "take one of them"
            return f"{name} {given}: is not one of {words}; {hint}"
        if found := re.fullmatch(r"argument (\S+): expected .* arguments?", message):
            return f"{found.group(1)}: has no value; write one behind it"
        if found := re.fullmatch(r"argument \S+: (--\w+ .*: .*; .*)", message):
            return found.group(1)
        if found := re.fullmatch(r"argument (\S+): not allowed with argument (\S+)", message):
            return f"{found.group(1)}: contradicts {found.group(2)}; keep one of them"
        if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
            near = difflib.get_close_matches(found.group(1), self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the known ones"
            return f"{found.group(1)}: no such flag; {hint}"
        if found := re.fullmatch(
            r"(?:the following|one of the) arguments (?:are required: )?(.*)", message
        ):
            names = found.group(1).removesuffix(" is required")
            return f"{names}: is missing; --help says what it is"
        return f"{message}; --help shows how"
