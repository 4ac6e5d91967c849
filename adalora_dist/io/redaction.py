"""Access tokens and passwords stay out of everything that a run writes down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
_TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{16}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web tokens
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # scheme://name:password@host
_IN_QUERY = re.compile(r"(?i)(?<![a-z])((?:token|key|secret|password|signature|sig)=)[^&\s]+")
_SECRET_FLAG = re.compile(r"(?i)--?[\w-]*(?:token|password|secret|api[-_]key|credential)$")


def redacted(value: Any) -> Any:
    """``value`` (text, or lists and mappings of it) with everything that looks like a secret replaced by ``***``."""
    if isinstance(value, str):
        return _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_ADDRESS.sub(HIDDEN, _TOKENS.sub(HIDDEN, value)))
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def redacted_command(words: Sequence[str]) -> list[str]:
    """A command line, also without the values of flags that are called token, password, secret and the like."""
    shown: list[str] = redacted(list(words))
    for index, word in enumerate(words[:-1]):
        if _SECRET_FLAG.match(word) and not words[index + 1].startswith("--"):
            shown[index + 1] = HIDDEN
    return shown
