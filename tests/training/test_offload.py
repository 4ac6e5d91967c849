"""An optimizer offloaded to the host has to stay the one that the method works on; accelerate would exchange it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.paths import DS_CONFIGS
from tests.support.ranks import run_ranks
from tests.support.resume_runs import configuration, run, write_model


def test_shipped_files_leave_the_optimizer_alone() -> None:
    files = {path.name: json.loads(path.read_text()) for path in Path(DS_CONFIGS).glob("*.json")}
    offloads = {name: d for name, d in files.items() if "offload_optimizer" in d["zero_optimization"]}
    assert "zero3_offload.json" in offloads
    assert all(d["zero_force_ds_cpu_optimizer"] is False for d in offloads.values())


@pytest.mark.slow
def test_an_offloaded_run_does_what_one_process_does(tmp_path: Path) -> None:
    found = []
    for engine, world_size in (("single", 1), ("zero3_offload", 2)):
        folder = tmp_path / engine
        write_model(folder)
        config = configuration(folder, world_size, checkpoint_every=0, dropout=0.0)
        found.append(run_ranks(world_size, run, engine, config)[0])
    one, offloaded = found
    assert offloaded.losses == pytest.approx(one.losses, rel=1e-3) and offloaded.patterns == one.patterns
