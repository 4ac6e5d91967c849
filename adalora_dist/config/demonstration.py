"""A recipe shows itself where the command line says nothing of what to train on what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_WHAT = {"--config", "--preset", "--model", "--data"}


def or_demonstration(argv: Sequence[str], file: Path) -> list[str]:
    """``argv``, with ``--config FILE`` before it where it names no file, preset, model or data."""
    given = {argument.partition("=")[0] for argument in argv}
    return [*argv] if given & _WHAT else ["--config", str(file), *argv]
