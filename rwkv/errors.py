"""The errors that a user can mend: their message is all that a command prints."""


class InputError(ValueError):
    """A flag, file or value from outside is wrong.

    The message reads `WHERE: what is wrong, with the value; what to do`. Commands print it on one
    line and leave with status 2.
    """


class RunError(RuntimeError):
    """The input is right, and yet it cannot be done here: software or a GPU is missing, or a loss
    is no number any more.

    Its message is like InputError's; commands print it and leave with status 1.
    """


def not_finite(what: str) -> RunError:
    """The error for a model that gives no numbers; `what` names what it should have given."""
    return RunError(
        f"{what} of the model are no finite numbers: its file or the adapter's is damaged, or they "
        "do not belong together; take other ones, or --dtype fp32"
    )
