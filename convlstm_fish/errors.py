"""The one exception that a person, rather than a programmer, is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot be used, told in one line: the file or option, its value and what would be right.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))
