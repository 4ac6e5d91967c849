"""Where this package keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads are kept: $ADALORA_DIST_CACHE, else $XDG_CACHE_HOME/adalora-dist, else ~/.cache/adalora-dist."""
    own = os.environ.get("ADALORA_DIST_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "adalora-dist"
