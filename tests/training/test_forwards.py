"""What a forward takes and keeps is a matter of memory: on every engine the run is the same, and continues exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adalora_dist.io.errors import UserError
from tests.support.ranks import run_ranks
from tests.support.resume_runs import (
    INTERVAL,
    WARMUP,
    WORLD_SIZES,
    assert_continues_exactly,
    configuration,
    new_project,
    run,
    write_model,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    run_ranks(1, lambda rank, world_size: write_model(folder))
    return folder / "model"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_micro_batches_by_tokens(model: Path, tmp_path: Path, engine: str) -> None:
    """Steps of one to three micro-batches: what one process learns in one, and exactly that when continued."""
    whole, undisturbed, project = (new_project(model, tmp_path / name) for name in ("whole", "undisturbed", "project"))
    changes: dict[str, Any] = {"dropout": 0.0, "micro_batch_tokens": 8, "checkpoint_every": 7}
    [alone] = run_ranks(1, run, "single", configuration(whole, 1, **changes | {"micro_batch_tokens": 0}), timeout=400)
    expected = run_ranks(2, run, engine, configuration(undisturbed, 2, **changes), timeout=400)
    torch.testing.assert_close(expected[0].losses, alone.losses, rtol=1e-5, atol=1e-5)
    assert_continues_exactly(project, engine, expected, (WARMUP + 2 * INTERVAL + 2, 0), **changes)


def test_blocks_gathered_ahead_change_no_bit(model: Path, tmp_path: Path) -> None:
    results = []
    kinds: list[dict[str, Any]] = [
        {}, {"fsdp_prefetch": 1}, {"fsdp_prefetch": 9, "gradient_checkpointing": True},
    ]  # fmt: skip
    for number, kind in enumerate(kinds):
        config = configuration(new_project(model, tmp_path / str(number)), 2, checkpoint_every=0, **kind)
        results.append(run_ranks(2, run, "fsdp2", config, timeout=400)[0])
    for other in results[1:]:
        assert other.losses == results[0].losses and other.patterns == results[0].patterns
        assert all(torch.equal(tensor, results[0].state[name]) for name, tensor in other.state.items())


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_what_is_recomputed_changes_no_bit(model: Path, tmp_path: Path, engine: str) -> None:
    selective = "selective" if engine != "zero3" else "full"  # it is refused there, see below
    kinds: list[dict[str, Any]] = [
        {},
        {"gradient_checkpointing": True, "checkpoint_activations": selective, "offload_activations": True},
        {"gradient_checkpointing": True, "checkpoint_activations": 2},
    ]
    results = []
    for number, kind in enumerate(kinds):
        project, world_size = new_project(model, tmp_path / str(number)), WORLD_SIZES[engine]
        config = configuration(project, world_size, checkpoint_every=0, **kind)
        results.append(run_ranks(world_size, run, engine, config, timeout=400)[0])
    for other in results[1:]:
        assert other.losses == results[0].losses and other.patterns == results[0].patterns
        assert all(torch.equal(tensor, results[0].state[name]) for name, tensor in other.state.items())


def test_selective_checkpointing_is_refused_under_zero3(model: Path, tmp_path: Path) -> None:
    def refused(rank: int, world_size: int) -> str:
        changes = {"gradient_checkpointing": True, "checkpoint_activations": "selective"}
        with pytest.raises(UserError) as error:
            run(rank, world_size, "zero3", configuration(new_project(model, tmp_path / str(rank)), 2, **changes))
        return str(error.value)

    for message in run_ranks(2, refused, timeout=400):
        assert message.startswith("checkpoint_activations selective under ZeRO-3: ") and "to full" in message
