"""What goes wrong on one rank ends the run on all, soon, with one error; what can be survived is survived."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty_runs import Ended, Fault, Ranks, run

from adalora_dist.training.verdict import EXIT_PEER


def errors(ended: list[Ended]) -> list[str]:
    """Lines that look like errors, over all ranks."""
    signs = ("rror", "Traceback", "gloo")
    return [line for one in ended for line in one.log.splitlines() if any(sign in line for sign in signs)]


@pytest.mark.parametrize(("kind", "code", "says"), [
    ("raise", 1, "KeyError: 'a broken row'"),
    ("memory", 1, "error: rank 1: OutOfMemoryError (CUDA out of memory. Tried to allocate 2.00 GiB): in step 6; of"),
    ("exit", 3, None),
])  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all(tmp_path: Path, kind: str, code: int, says: str | None, rank: int) -> None:
    ended = Ranks(3, tmp_path, run, tmp_path, "ddp", Fault(kind, rank=rank)).wait(30)
    assert [one.code for one in ended] == [code if k == rank else EXIT_PEER for k in range(3)], [e.log for e in ended]
    if says is not None:
        assert sum(says.replace("rank 1", f"rank {rank}") in one.log for one in ended) == 1, errors(ended)
        assert says.replace("rank 1", f"rank {rank}") in ended[rank].log
    for k, one in enumerate(ended):
        assert k == rank or not errors([one]), one.log
    assert not list(tmp_path.glob("published-*"))
