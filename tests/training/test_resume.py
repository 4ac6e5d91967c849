"""Runs that are stopped and continued: bit for bit on the same engine, and to rounding on any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adalora_dist.config.methods import AdaLoraConfig, HeadConfig, LoraConfig
from adalora_dist.config.sections import ModelConfig, RunConfig, TrainConfig
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.training.resume import (
    _changes,
    backbone_identity,
    compare_backbone,
    compare_data,
    find_checkpoint,
    loss_scale,
    set_loss_scale,
)
from adalora_dist.training.run_folder import RunFolder, refuse_used_folder
from tests.support.ranks import run_ranks
from tests.support.refusals import refusal
from tests.support.resume_runs import (
    FINAL,
    INTERVAL,
    PAIRS,
    STEPS,
    WARMUP,
    WORLD_SIZES,
    Result,
    assert_continues_elsewhere,
    assert_continues_exactly,
    configuration,
    deepspeed,
    new_project,
    rows,
    run,
    write_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    run_ranks(1, lambda rank, world_size: write_model(folder))
    return folder / "model"


@pytest.fixture
def project(model: Path, tmp_path: Path) -> Path:
    return new_project(model, tmp_path / "project")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run without any stop gives on an engine, per rank."""
    results: dict[str, list[Result]] = {}

    def of(engine: str) -> list[Result]:
        if engine not in results:
            folder = new_project(model, tmp_path_factory.mktemp("undisturbed") / "project")
            world_size = WORLD_SIZES[engine]
            results[engine] = run_ranks(
                world_size, run, engine, configuration(folder, world_size, checkpoint_every=0), timeout=400
            )
            assert not (folder / "run" / "checkpoints").exists()
        return results[engine]

    return of


def test_the_run_is_worth_stopping(undisturbed: Any) -> None:
    """It learns, patterns move, pruning starts and ends, epochs end within it, dropout and a trained head take part."""
    [result] = undisturbed("single")
    patterns = [tuple(keep) for _, _, keep in result.patterns]
    assert len(set(patterns)) >= 6 and sum(patterns[-1]) == 21
    assert [step for step, _, _ in result.patterns][0] > WARMUP and result.patterns[-1][0] == STEPS - FINAL
    assert sum(result.losses[-5:]) < 0.6 * sum(result.losses[:5])
    assert "lm_head.weight" in result.state and configuration(Path("x")).adapter.dropout > 0
    assert BatchPlan.of_rows(rows(), 6, 6).num_batches_per_epoch == 3


# In the middle of an accumulation, at an epoch's edge and a selection; then at the last selection.
@pytest.mark.parametrize("stop", [(WARMUP + 2 * INTERVAL + 2, 1), (STEPS - FINAL, 1)], ids=str)
def test_one_process_continues_bit_for_bit(project: Path, undisturbed: Any, stop: tuple[int, int]) -> None:
    assert_continues_exactly(project, "single", undisturbed("single"), stop)


def test_continues_from_the_last_checkpoint_before_the_stop(project: Path, undisturbed: Any) -> None:
    assert_continues_exactly(project, "single", undisturbed("single"), (18, 1), checkpoint_every=10)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(STEPS))
def test_one_process_continues_from_every_step(project: Path, undisturbed: Any, step: int) -> None:
    assert_continues_exactly(project, "single", undisturbed("single"), (step, step % 2))


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 3, 9, 11, 20, 26, 39, 40, 41, 59])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_continue_bit_for_bit(project: Path, undisturbed: Any, engine: str, step: int) -> None:
    assert_continues_exactly(project, engine, undisturbed(engine), (step, step % 2))


@pytest.mark.slow
def test_asynchronous_checkpoints_continue_bit_for_bit(project: Path, undisturbed: Any) -> None:
    assert_continues_exactly(
        project, "fsdp2", undisturbed("fsdp2"), (21, 1), async_checkpoints=True, checkpoint_every=5
    )


# ---------------------------------------------------------------------------- another engine, another number of ranks


@pytest.mark.parametrize(
    ("pair", "stop"),
    [(("single", 1, "ddp", 2), STEPS - FINAL + 2), (("fsdp2", 2, "zero3", 2), WARMUP + 1)],
    ids=str,
)
def test_continues_on_another_engine(model: Path, tmp_path: Path, pair: tuple[str, int, str, int], stop: int) -> None:
    assert assert_continues_elsewhere(model, tmp_path, *pair, stop=stop) < 1e-6


# While triplets are pruned, before the selection that freezes the pattern, and after their removal from memory.
@pytest.mark.slow
@pytest.mark.parametrize("stop", [25, STEPS - FINAL, STEPS - FINAL + 5])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_continues_on_every_other_engine_and_size(
    model: Path, tmp_path: Path, pair: tuple[str, int, str, int], stop: int
) -> None:
    assert assert_continues_elsewhere(model, tmp_path, *pair, stop=stop) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("packs", [(True, False), (False, True)])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("stop", [25, STEPS - FINAL + 5])
def test_continues_with_packed_adapters_and_without(
    model: Path, tmp_path: Path, engine: str, stop: int, packs: tuple[bool, bool]
) -> None:
    assert assert_continues_elsewhere(model, tmp_path, engine, 2, engine, 3, stop=stop, packs=packs) < 1e-6


# ---------------------------------------------------------------------------------------------------- may it continue?


@pytest.fixture(scope="module")
def stopped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run was stopped with checkpoints of steps 2 and 3."""
    project = new_project(model, tmp_path_factory.mktemp("stopped") / "project")
    run_ranks(1, run, "single", configuration(project), (3, 1))
    return project


def names_in(project: Path) -> list[str]:
    return sorted(path.name for path in (project / "run" / "checkpoints").iterdir())


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy", symlinks=True)
    assert names_in(tmp_path / "copy") == ["step-00000002", "step-00000003"]
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "change",
    [
        {"init_rank": 4}, {"orthogonality": 0.2}, {"learning_rate": 1e-3}, {"max_steps": 80}, {"seed": 7},
        {"precision": "bf16"}, {"batch_size": 12}, {"mask_interval_steps": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_that_would_change_the_run_is_refused_by_name(copy: Path, change: dict[str, Any]) -> None:
    config = configuration(copy, resume="auto", **change)
    message = refusal(find_checkpoint, config)
    [(name, value)] = change.items()
    assert f".{name} " in message and f"-> {value}" in message and "step-00000003" in message
    assert names_in(copy) == ["step-00000002", "step-00000003"]


def test_settings_that_do_not_change_the_run_are_free(copy: Path) -> None:
    config = configuration(
        copy, resume="auto", log_every=3, keep_checkpoints=5, checkpoint_every=7, micro_batch_size=6,
        micro_batch_tokens=64, gradient_checkpointing=True,
    )  # fmt: skip
    found = find_checkpoint(config)
    assert found is not None and found.step == 3


def test_other_rows_are_refused(copy: Path) -> None:
    checkpoint = find_checkpoint(configuration(copy, resume="auto"))
    assert checkpoint is not None
    changed = rows()
    changed[5]["input_ids"] = changed[5]["labels"] = [9] * len(changed[5]["labels"])  # of the same lengths
    config = CommonsenseConfig.model_validate(configuration(copy).model_dump() | {"data": {"max_length": 99}})
    compare_data(checkpoint, BatchPlan.of_rows(rows(), 6, 6), config)
    message = refusal(compare_data, checkpoint, BatchPlan.of_rows(changed, 6, 6), config)
    assert "training rows" in message
    checkpoint.run["config"]["data"] = {"max_length": 256}
    assert "data.max_length 256 -> 99" in refusal(compare_data, checkpoint, BatchPlan.of_rows(changed, 6, 6), config)


def test_another_backbone_is_refused(copy: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(configuration(copy, resume="auto"))
    assert checkpoint is not None
    moved, other = tmp_path / "moved", tmp_path / "other"
    for folder in (moved, other):
        shutil.copytree(copy / "model", folder)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    compare_backbone(checkpoint, ModelConfig(name=str(moved)))
    assert str(other) in refusal(compare_backbone, checkpoint, ModelConfig(name=str(other)))
    assert backbone_identity(ModelConfig())["sha256"] is None


def test_a_backbone_in_pickles_is_known_by_its_weights(tmp_path: Path) -> None:
    """Which an archive's directory, at its end, has checksums of, wherever in the file they differ."""
    model = ModelConfig(name=str(tmp_path))
    found = []
    for value in (0.0, 1.0, 0.0):
        weights = {name: torch.zeros(300, 300) for name in "abc"}
        weights["b"][150, 150] = value
        torch.save(weights, tmp_path / "pytorch_model.bin")
        found.append(backbone_identity(model)["sha256"])
    assert found[0] == found[2] != found[1]


def test_auto_starts_a_run_where_there_is_none(tmp_path: Path) -> None:
    assert find_checkpoint(configuration(tmp_path, resume="auto")) is None
    assert find_checkpoint(configuration(tmp_path, resume="never")) is None


def test_auto_never_starts_afresh_over_steps_that_were_made(copy: Path) -> None:
    shutil.rmtree(copy / "run" / "checkpoints")
    message = refusal(find_checkpoint, configuration(copy, resume="auto"))
    assert "has no checkpoint" in message and "--overwrite" in message
    (copy / "run" / "metrics.jsonl").write_text("")  # killed before its first step
    assert find_checkpoint(configuration(copy, resume="auto")) is None


def test_a_path_is_taken_at_its_word(copy: Path, tmp_path: Path) -> None:
    first = copy / "run" / "checkpoints" / "step-00000002"
    elsewhere = {"output_dir": str(tmp_path / "new")}
    for path, step in ((first, 2), (copy / "run", 3)):
        found = find_checkpoint(configuration(copy, resume=str(path), **elsewhere))
        assert found is not None and found.step == step
    assert names_in(copy) == ["step-00000002", "step-00000003"], "another run's checkpoints were touched"
    assert "holds no checkpoint" in refusal(find_checkpoint, configuration(copy, resume=str(tmp_path), **elsewhere))
    config = configuration(copy, resume=str(first))
    found = find_checkpoint(config)
    assert found is not None and names_in(copy) == ["step-00000002", "step-00000003"], "what may yet be refused"
    RunFolder(config, True, {}, found)
    assert names_in(copy) == ["step-00000002", "step-00000003.0.removed"]
    (first / "state.json").write_text("")
    assert "state.json" in refusal(find_checkpoint, configuration(copy, resume=str(first)))


def test_run_folder_of_a_continued_run(copy: Path, tmp_path: Path) -> None:
    assert "--resume auto" in refusal(refuse_used_folder, configuration(copy))
    first = copy / "run" / "checkpoints" / "step-00000002"
    inside = configuration(copy, resume=str(first), overwrite=True)
    assert "would remove" in refusal(refuse_used_folder, inside)
    with pytest.raises(ValueError, match="overwrite true with resume auto"):
        TrainConfig(overwrite=True, resume="auto")
    for config in (
        configuration(copy, resume=str(first), output_dir=str(tmp_path / "new")),
        configuration(copy, resume=str(first)),
    ):
        refuse_used_folder(config)
        folder = RunFolder(config, True, {}, find_checkpoint(config))
        assert [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == [0, 1]
        assert json.loads((folder.path / "run.json").read_text())["first_step"] == 2


# ---------------------------------------------------------------------------------------------------------- loss scale


class Engine:
    """The attributes of an accelerator that holds a scaler of fp16 gradients, and of DeepSpeed's optimizer."""

    def __init__(self, scaler: Any = None, deepspeed_scaler: Any = None) -> None:
        self.scaler = scaler
        self.optimizer = type("Zero", (), {"loss_scaler": deepspeed_scaler})()


def torch_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)


def deepspeed_scaler() -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    return DynamicLossScaler(2.0**10, 4, 1, delayed_shift=2, consecutive_hysteresis=False)


def after_one_overflow_and_two_good_steps(engine: Engine) -> None:
    if engine.scaler is not None:
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        for bad in (True, False, False):
            engine.scaler.scale(torch.ones(1))
            parameter.grad = torch.full((1,), float("inf") if bad else 1.0)
            engine.scaler.step(optimizer)
            engine.scaler.update()
    else:
        for overflow in (True, True, False, False):
            engine.optimizer.loss_scaler.update_scale(overflow)


@pytest.mark.parametrize("source", ["torch", "deepspeed"])
@pytest.mark.parametrize("target", ["torch", "deepspeed"])
def test_the_loss_scale_continues_on_any_engine(source: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist.get_rank", lambda: 1)

    def made(kind: str) -> Engine:
        return Engine(scaler=torch_scaler()) if kind == "torch" else Engine(deepspeed_scaler=deepspeed_scaler())

    old, new = made(source), made(target)
    after_one_overflow_and_two_good_steps(old)
    saved = loss_scale(old, old)  # type: ignore[arg-type]
    assert saved is not None and (saved["scale"], saved["good_steps"]) == (2.0**9, 2)
    set_loss_scale(new, new, json.loads(json.dumps(saved)))  # type: ignore[arg-type]
    assert loss_scale(new, new) == {**loss_scale(made(target), made(target)), **saved} or source != target  # type: ignore[arg-type,dict-item]
    again = loss_scale(new, new)  # type: ignore[arg-type]
    assert again is not None and (again["scale"], again["good_steps"]) == (2.0**9, 2)
    assert loss_scale(Engine(), Engine()) is None  # type: ignore[arg-type]
    assert deepspeed is not None


def test_settings_are_compared_as_those_of_the_runs_own_method() -> None:
    config = RunConfig(adapter=LoraConfig(alpha=3))
    stored = config.model_dump(mode="json")
    stored["adapter"]["target_rank"] = 8.0  # of a time when all methods had it
    del stored["adapter"]["dropout"]  # of a time before it
    checkpoint: Any = SimpleNamespace(run={"config": stored})
    assert list(_changes(checkpoint, config, free=False)) == []
    stored["adapter"]["alpha"] = 4.0
    assert list(_changes(checkpoint, config, free=False)) == ["adapter.alpha 4.0 -> 3.0"]
    changes = list(_changes(checkpoint, RunConfig(adapter=HeadConfig()), free=False))
    assert changes[0] == "adapter.method lora -> head"


def test_a_checkpoint_from_before_start_was_a_setting_is_of_the_published_start() -> None:
    now = RunConfig(adapter=AdaLoraConfig(start="paper"))
    stored = RunConfig().model_dump(mode="json")
    for name in ("start", "rslora", "lora_plus_ratio"):
        del stored["adapter"][name]
    stored["adapter"] |= {"init": "gaussian", "orthogonality_form": "norm"}
    checkpoint: Any = SimpleNamespace(run={"config": stored})
    assert list(_changes(checkpoint, now, free=False)) == []
    matched = list(_changes(checkpoint, RunConfig(), free=False))
    assert "adapter.start paper -> matched" in matched
    stored["adapter"]["init"] = "orthonormal"
    assert list(_changes(checkpoint, now, free=False)) == ["adapter.init orthonormal -> gaussian"]
