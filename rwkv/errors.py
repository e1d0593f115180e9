"""The error that a user can mend: its message is all that a command prints."""


class InputError(ValueError):
    """A flag, file or value from outside is wrong.

    The message reads `WHERE: what is wrong, with the value; what to do`. Commands print it on one
    line and leave with status 2.
    """
