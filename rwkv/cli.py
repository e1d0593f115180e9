"""What every command shares: names checked, errors on one line, exit statuses."""

import os
import sys
from collections.abc import Callable

from rwkv.errors import InputError, RunError
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
