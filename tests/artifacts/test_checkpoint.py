"""Checkpoint files under crashes and damage, and what loading refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adalora_dist.artifacts.checkpoints.content import Checkpoint, load_checkpoint
from adalora_dist.artifacts.checkpoints.files import Damaged, Written, checkpoints_in, publish, verify
from adalora_dist.artifacts.checkpoints.writer import checkpoint_at, newest_checkpoint, set_newer_aside
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.protocol import trained_parameters
from adalora_dist.sharding.agreement import agreed
from tests.support.checkpoint_faults import (
    DAMAGES,
    Disk,
    Run,
    check_crashes,
    check_damages,
    contents,
    crash_states,
    materialise,
    record,
)
from tests.support.models import adapted_net, config
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.refusals import refusal


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 10 and 20."""
    run = Run(tmp_path / "run")
    for step in (10, 20):
        run.save(step)
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------------------- files


def test_the_newest_are_kept_and_nothing_else_is_left(root: Path) -> None:
    (root / "step-00000015.partial").mkdir()
    (root / "notes.txt").write_text("a user's")
    Run(root).save(30)
    assert names_in(root) == ["notes.txt", "step-00000020", "step-00000030"]
    found = newest_checkpoint(root)
    assert found is not None and found.step == 30 and found.run == {"step": 30}
    assert found.read("metrics.jsonl") == b"{}\n"
    assert names_in(found.path) == [
        "manifest.json", "metrics.jsonl", "shard-00000-of-00001.safetensors", "state.json"
    ]  # fmt: skip


def test_every_crash_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """All prefixes of the writer's operations, with torn writes and without what was not fsynced."""
    num_states, found_steps = check_crashes(tmp_path)
    assert num_states > 500 and found_steps == {20, 30}


def test_the_first_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    root = tmp_path / "disk" / "new" / "run"
    run, disk = Run(root), Disk(tmp_path / "disk")
    operations = record(lambda: run.save(10))
    steps = []
    for done, state in crash_states(tmp_path / "disk", disk, operations):
        materialise(state, tmp_path / "after")
        found = newest_checkpoint(tmp_path / "after" / "new" / "run")
        steps.append(found and found.step)
        assert found is not None or done < len(operations)
    assert set(steps) == {None, 10}


def test_the_disk_of_these_tests_does_lose_things(root: Path, tmp_path: Path) -> None:
    """Without the writer's fsyncs there are states in which nothing can be recovered."""
    shutil.rmtree(root)
    run = Run(root, keep=1)
    run.save(20)
    disk = Disk(root)
    operations = [op for op in record(lambda: run.save(30)) if op[0] != "fsync"]
    lost = 0
    for _, state in crash_states(root, disk, operations):
        materialise(state, tmp_path / "after")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lost += newest_checkpoint(tmp_path / "after") is None
        except UserError:
            lost += 1
    assert lost > 0


def test_every_damage_is_found_and_named(tmp_path: Path) -> None:
    counts = check_damages(tmp_path, 210)
    assert sum(counts.values()) == 210 and counts.keys() == {d.__name__ for d in DAMAGES}


def test_nothing_usable_is_a_refusal(root: Path) -> None:
    for folder in checkpoints_in(root):
        (folder / "state.json").write_text("{}")
    message = refusal(newest_checkpoint, root)
    assert "step-00000020/state.json has 2 bytes" in message and "step-00000010/state.json" in message
    assert "--overwrite" in message
    assert "state.json" in refusal(checkpoint_at, root / "step-00000020")
    assert "manifest.json" in refusal(checkpoint_at, root / "step-00000040")


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_a_renamed_folder_is_not_believed(root: Path) -> None:
    (root / "step-00000020").rename(root / "step-00000090")
    with pytest.raises(Damaged, match="that of step 20"):
        verify(root / "step-00000090")


def test_a_manifest_cannot_lead_out_of_its_folder(root: Path) -> None:
    (root / "outside").write_bytes(b"x")
    (root / "step-00000030.partial").mkdir()
    publish(root / "step-00000030.partial", [Written("../outside", 1, "0" * 64)])
    with pytest.raises(Damaged, match="outside of its folder"):
        verify(root / "step-00000030")


def test_newer_ones_are_set_aside_and_go_with_the_next(root: Path) -> None:
    set_newer_aside(checkpoint_at(root / "step-00000010"))
    assert names_in(root) == ["step-00000010", "step-00000020.0.removed"]
    Run(root).save(15)
    assert names_in(root) == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize("name", ["shard-00000-of-00001.safetensors", "state.json", "manifest.json", "folder"])
def test_a_disk_that_is_full_leaves_the_old_ones(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whichever file it is that has no room any more."""
    before = {path.name: contents(path) for path in root.iterdir()}
    real_open, real_mkdir, full_disk, found = os.open, os.mkdir, OSError(28, "No space left on device"), []

    def full(path: Any, flags: int, mode: int = 0o777) -> int:
        if Path(path).name == name and flags & os.O_CREAT:
            found.append(path)
            raise full_disk
        return real_open(path, flags, mode)

    def no_folder(path: Any, mode: int = 0o777) -> None:
        if name == "folder":
            found.append(path)
            raise full_disk
        real_mkdir(path)

    run = Run(root)
    monkeypatch.setattr("adalora_dist.artifacts.checkpoints.files.os.open", full)
    monkeypatch.setattr("adalora_dist.artifacts.checkpoints.files.os.mkdir", no_folder)
    with pytest.raises(UserError, match="a checkpoint needs .* bytes"):
        run.save(30)
    monkeypatch.undo()
    assert found and {path.name: contents(path) for path in root.iterdir()} == before


def test_a_folder_that_may_not_be_written_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Any, mode: int = 0o777) -> None:
        raise PermissionError(13, "Permission denied", path)

    run = Run(root)
    monkeypatch.setattr("adalora_dist.artifacts.checkpoints.files.os.mkdir", refused)
    with pytest.raises(UserError, match="cannot be written .Permission denied"):
        run.save(30)
    monkeypatch.undo()
    shutil.rmtree(root)
    (root.parent / "elsewhere").mkdir()
    root.symlink_to("elsewhere")
    with pytest.raises(UserError, match="is a link"):
        run.save(30)
    assert not any((root.parent / "elsewhere").iterdir())


# ----------------------------------------------------------------------------------------------------------- content


def stored(root: Path, change: Any) -> Checkpoint:
    """The newest checkpoint after ``change`` of its first shard's tensors and spans and of state.json, manifest made
    anew: what only a bug could write."""
    folder = newest_checkpoint(root).path  # type: ignore[union-attr]
    shard = folder / "shard-00000-of-00001.safetensors"
    tensors, state = load_file(shard), json.loads((folder / "state.json").read_text())
    run = Run(root.parent / "other")
    spans = {name: [0, p.numel()] for name, p in run.parameters.items()}
    change(tensors, spans, state)
    save_file(tensors, shard, metadata={"spans": json.dumps(spans)})
    return Checkpoint(folder, state["step"], state, (shard.name,))


def lose_half(tensors: dict, spans: dict, state: dict) -> None:
    spans["blocks.0.up.P"] = [0, 10]
    tensors["blocks.0.up.P"] = tensors["blocks.0.up.P"][:10]


def lose_average(tensors: dict, spans: dict, state: dict) -> None:
    del tensors["sensitivity/blocks.0.up.P"]


def lose_parameter(tensors: dict, spans: dict, state: dict) -> None:
    del state["parameters"]["adalora.lam"]


def another_parameter(tensors: dict, spans: dict, state: dict) -> None:
    state["parameters"]["blocks.7.down.P"] = {"shape": [3], "step": None, "state": []}


def another_shape(tensors: dict, spans: dict, state: dict) -> None:
    state["parameters"]["adalora.lam"]["shape"] = [4]


def another_optimizer(tensors: dict, spans: dict, state: dict) -> None:
    for described in state["parameters"].values():
        described.update(step=3.0, state=["momentum_buffer"])
    tensors |= {f"momentum_buffer/{name}": tensors[name].clone() for name in spans}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_half, ["values of blocks.0.up.P from element 10 on"]),
        (lose_average, ["sensitivity of blocks.0.up.P from element 0 on"]),
        (lose_parameter, ["adalora.lam", "not there in the checkpoint", "(12,)"]),
        (another_parameter, ["blocks.7.down.P", "not there in this run"]),
        (another_shape, ["adalora.lam", "(4,)", "(12,)"]),
        (another_optimizer, ["momentum_buffer", "exp_avg"]),
    ],
)
def test_what_is_missing_is_an_error(root: Path, change: Any, words: list[str]) -> None:
    checkpoint, run = stored(root, change), Run(root.parent / "another")
    message = refusal(load_checkpoint, checkpoint, run.parameters, run.optimizer, run.hooks)
    assert all(word in message for word in words), message


def test_a_checkpoint_brings_back_what_it_was_given(root: Path) -> None:
    checkpoint, run = newest_checkpoint(root), Run(root.parent / "another")
    assert checkpoint is not None
    load_checkpoint(checkpoint, run.parameters, run.optimizer, run.hooks)
    assert run.hooks.step == 20
    for number, parameter in enumerate(run.parameters.values()):
        assert torch.equal(parameter, torch.full_like(parameter, 20 + number / 100))


BEFORE = ROOT / "tests" / "data" / "checkpoints_of_9b9f82c"
"""Written by that commit, when methods without adapters kept nothing of their own."""


@pytest.mark.parametrize("method", ["adalora", "head"])
def test_checkpoints_from_before_the_methods_were_units_are_read(tmp_path: Path, method: str) -> None:
    settings = config(method=method, train_modules=("head",) if method == "head" else ())
    model = adapted_net(settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    hooks = attach(model, optimizer, settings, 60)
    hooks.detach()
    parameters = trained_parameters(model)
    checkpoint = newest_checkpoint(shutil.copytree(BEFORE / method, tmp_path / "checkpoints"))
    assert checkpoint is not None and parameters
    load_checkpoint(checkpoint, parameters, optimizer, hooks)
    assert hooks.step == 20 and hooks.num_skipped_steps == 0
    for number, parameter in enumerate(parameters.values()):
        assert torch.equal(parameter, torch.full_like(parameter, 20 + number / 100))


def save_in_a_thread(rank: int, world_size: int, folder: Path) -> list[float]:
    run = Run(folder / "run", keep=9)
    run.writer.asynchronous = True
    for step in (10, 20):
        run.save(step)
        with torch.no_grad():
            next(iter(run.parameters.values())).fill_(-1)  # training goes on
    run.writer.wait()
    again, values = Run(folder / "again"), []
    for step in (10, 20):
        checkpoint = checkpoint_at(folder / "run" / f"step-{step:08d}")
        load_checkpoint(checkpoint, again.parameters, again.optimizer, again.hooks)
        values.append(next(iter(again.parameters.values())).flatten()[0].item())
    return values


@pytest.mark.parametrize("world_size", [1, 2])
def test_writing_while_training_goes_on(world_size: int, tmp_path: Path) -> None:
    assert run_ranks(world_size, save_in_a_thread, tmp_path)[0] == [10.0, 20.0]


def fail_on_one(rank: int, world_size: int) -> str:
    def action() -> int:
        if rank == 1:
            raise OSError(28, "No space left on device", "/disk/file")
        return rank

    try:
        agreed(action)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_all_ranks_stop_when_one_cannot_write() -> None:
    messages = run_ranks(3, fail_on_one)
    assert all("No space left on device: '/disk/file'" in message for message in messages)
    assert all(messages[rank].startswith("RuntimeError: rank 1: OSError") for rank in (0, 2))


# ----------------------------------------------------------------------------------------------------------- pickles

PICKLE_NAMES = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "random_states_0.pkl",
    "pytorch_model.bin", "adapter_model.bin", "model.pt", "state.pt", "state.pkl", "state.bin", "training_args.bin",
    "trainer_state.pt", "checkpoint.pt", "patterns.pt", "shard-00000-of-00001.pt", "shard-00001-of-00002.safetensors",
    ".metadata", "__0_0.distcp", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest",
    "manifest.pkl", "metrics.pkl", "scaler.pt", "custom_checkpoint_0.pkl",
)  # fmt: skip


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("this would have been any code",)


def load_beside_pickles(rank: int, world_size: int, root: Path) -> tuple[int, int, list[int | None]]:
    """Unpickling events: of one pickle that is loaded on purpose, and of the checkpoint's own loading."""
    events = []
    sys.addaudithook(lambda event, _: events.append(event) if event == "pickle.find_class" else None)
    pickle.loads(pickle.dumps(Malicious()))
    control = len(events)
    steps: list[int | None] = []
    for folder in (*checkpoints_in(root), root, root.parent):
        for name in PICKLE_NAMES:
            (folder / name).write_bytes(pickle.dumps(Malicious()))
    for name in (None, "manifest.json", "state.json", "metrics.jsonl", "shard-00000-of-00001.safetensors"):
        if name is not None:
            (root / "step-00000020" / name).write_bytes(pickle.dumps(Malicious()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = newest_checkpoint(root)
        assert found is not None
        run = Run(root.parent / "again")
        load_checkpoint(found, run.parameters, run.optimizer, run.hooks)
        run.save(found.step + 1)
        steps.append(found.step)
    return control, len(events) - control, steps


def test_no_pickle_is_ever_read(root: Path) -> None:
    [(control, events, steps)] = run_ranks(1, load_beside_pickles, root)
    assert control == 1 and events == 0
    assert steps == [20, 10, 10, 10, 10]
