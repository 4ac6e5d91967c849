"""The one error type that users are meant to see without a traceback."""

from __future__ import annotations


def printable(value: object, max_characters: int = 200) -> str:
    """A value of a stranger's as text for a terminal: on one line, without what terminals act on, and not endless.

    Control characters, escape sequences, marks that turn the direction of writing and the like are shown as Python
    would write them.
    """
    text = "".join(c if c.isprintable() else " " if c in "\t\n\r" else ascii(c)[1:-1] for c in str(value))
    return text if len(text) <= max_characters else text[: max_characters - 3] + "..."


class UserError(ValueError):
    """Something the user set, named or provided cannot be honoured.

    The message is a single line: what, its value, the legal range, and the remedy. Programs print it to
    standard error and exit with code 2; libraries let it propagate like any ``ValueError``.
    """


def reason_of(error: Exception, max_characters: int = 300) -> str:
    """What a library's error says, on one line; with its kind where that alone is no sentence (KeyError: 'gelu2')."""
    text = " ".join(str(error).split())[:max_characters]
    says_little = isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError | AssertionError)
    return f"{type(error).__name__}: {text}" if says_little or not text else text
