"""The multi-rank harness reports what went wrong, whichever rank it was, and never waits for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.support import ranks
from tests.support.ranks import run_ranks


def _sum_of_ranks(rank: int, world_size: int, offset: float) -> tuple[int, float]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return rank, float(total)


def _fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("a message of rank 1")
    dist.barrier()


def _die(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(0)  # "success", but nothing reported


def _hang(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(rank)).touch()
    if rank == 0:
        time.sleep(600)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 3])
def test_results_come_in_rank_order(world_size: int) -> None:
    total = sum(range(world_size)) + 0.5 * world_size
    assert run_ranks(world_size, _sum_of_ranks, 0.5) == [(rank, total) for rank in range(world_size)]


def test_a_failing_rank_is_shown_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match="ValueError: a message of rank 1"):
        run_ranks(2, _fail)


def test_a_rank_that_reports_nothing_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no result from ranks .0"):
        run_ranks(2, _die)


def test_a_hanging_rank_is_ended_and_shows_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout is over as soon as both are where they hang."""

    def monotonic() -> float:
        return time.monotonic() + (500 if len(os.listdir(tmp_path)) == 2 else 0)

    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    with pytest.raises(AssertionError, match=r"still running after 300.0 s(.|\n)*in _hang"):
        run_ranks(2, _hang, tmp_path)
