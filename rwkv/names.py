"""Make sure that `peft`, `rwkv`, `losses` and `data` are this project's folders."""

import importlib.util
from pathlib import Path

from rwkv.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("rwkv", "peft", "losses", "data")


def check_names() -> None:
    """Stop if Python finds another package under the name of one of our folders.

    Raises:
        InputError: a package of the same name comes first on Python's path, as with `python -P`
            or when the command is started from another folder.
    """
    for name in FOLDERS:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != ROOT / name:
            raise InputError(
                f"{name}: Python found {found or 'nothing'} under this name, not {ROOT / name}; "
                f"start the command from {ROOT} and without python -P"
            )
