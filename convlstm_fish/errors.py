"""The one exception that a person, rather than a programmer, is meant to read, and the check that raises it."""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot be used, told in one line: the file or option, its value and what would be right.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def require(option: str, value: object, good: bool, expected: str) -> None:
    """Raise the one-line error for an option's value unless it is ``good``."""
    if not good:
        raise UserError(f"{option}: {value!r} is not {expected}")
