"""Where things are, said once."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout."""
DS_CONFIGS = ROOT / "ds_configs"
_SHARED = ROOT.parent / "shared"


def shared(path: str) -> Path:
    """Real data, or a real model, beside the checkout. Beside most there are none: the test then skips and says so."""
    if not (found := _SHARED / path).exists():
        pytest.skip(f"no real data at {found}")
    return found
