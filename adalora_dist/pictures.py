"""A run's ranks as pictures (SVG): the map of layers and matrices, and how budget, ranks and churn went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def draw_rank_map(pattern: Mapping[str, int], path: Path) -> None:
    """Heat map of active ranks, layers down and matrices across, one number in each cell.

    Args:
        pattern: active rank by name of the adapted matrix.
        path: of the SVG to write.

    Raises:
        UserError: matplotlib is not installed.
    """
    raise NotImplementedError
