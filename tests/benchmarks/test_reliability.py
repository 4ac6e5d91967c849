"""The kill trials of benchmarks/reliability.py, a few of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.kill_trials import exports, pushes, resumes


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("trials", [exports, pushes, resumes])
def test_killed_at_random_times(tmp_path: Path, trials: Callable[[Path, int, int], tuple[int, int]]) -> None:
    torch.set_num_threads(1)  # for the processes that are forked
    num_killed, num_whole = trials(tmp_path, 8, 1)
    assert num_killed > 0 and num_whole > 0
