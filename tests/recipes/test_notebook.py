"""The notebooks of the documentation: their cells run from top to bottom, and no output lies in them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.recipe_runs import run_command

NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


def cells_of(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_is_in_it_that_was_not_just_computed(path: Path) -> None:
    assert cells_of(path) and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells_of(path))
    assert f"({path.name})" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_run(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    program = "\n\n".join("".join(cell["source"]) for cell in cells_of(path))
    (tmp_path / "cells.py").write_text(program, encoding="utf-8")
    process = run_command(sys.executable, "cells.py", folder=tmp_path, MPLBACKEND="agg")
    assert process.returncode == 0, process.stderr[-3000:]
    if path.stem == "adaptive_ranks":
        [(before, after)] = re.findall(r"^loss on counting backwards: ([\d.]+) -> ([\d.]+)$", process.stdout, re.M)
        assert float(after) < 0.5 * float(before) and "sum of ranks: 168 -> 84\n" in process.stdout, process.stdout
