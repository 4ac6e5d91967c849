"""Where things are, said once."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout."""
SHARED = ROOT.parent / "shared"
"""Real data beside the checkout, where there are any; a test that needs them skips visibly without."""
DS_CONFIGS = ROOT / "ds_configs"
