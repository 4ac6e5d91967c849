"""The one error type that users are meant to see without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user set, named or provided cannot be honoured.

    The message is a single line: what, its value, the legal range, and the remedy. Programs print it to
    standard error and exit with code 2; libraries let it propagate like any ``ValueError``.
    """
