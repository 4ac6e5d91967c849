"""The GPU benchmark at toy sizes on a CPU: it runs, and every figure is there. What it measures is not looked at."""

import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from speed_gpu import CASES, report  # noqa: E402
from variants import NAMES  # noqa: E402

from tests.support.ranks import run_ranks  # noqa: E402

pytest.importorskip("bitsandbytes")
if shutil.which("g++") is None:
    pytest.skip("torch.compile needs a C++ compiler", allow_module_level=True)


def measure(rank: int, world_size: int, file: Path) -> None:
    with file.open("w") as out, redirect_stdout(out):
        report(torch.device("cpu"), tiny=True)


def test_all_figures_at_toy_sizes(tmp_path):
    run_ranks(1, measure, tmp_path / "report.md")
    _, _, *rows, _, update, _, peak = (tmp_path / "report.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], row[2]) for row in cells] == [(case.name, name) for case in CASES for name in NAMES.values()]
    assert all(float(value) > 0 for row in cells for value in row[3:4] + row[5:])
    assert "share of the bandwidth" in update and "tokens/s" in peak
