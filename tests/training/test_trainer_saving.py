"""What ``Trainer`` leaves of a run with adapters: folders that PEFT loads as the trained model, and exact resumes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from adalora_dist.artifacts.adapted_model import adapt
from adalora_dist.artifacts.export import load_adapter, save_adapter
from adalora_dist.training.trainer_callback import AdaLoraCallback
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import tiny_llama
from tests.support.trainer_runs import (
    SETTINGS,
    STEPS,
    VOCABULARY,
    adapters_of,
    arguments,
    example_rows,
    patterns_of,
    trainer_of,
)

TARGET = 21
FROZEN_FROM = STEPS - SETTINGS.final_steps + 1  # steps done when the pattern is final
SAVE_STEPS = 4
MODEL_FILES = {"config.json", "model.safetensors", "pytorch_model.bin", "adapter_config.json", "adapter.json"}
"""By which loaders take a folder for a model or an adapter."""
IDS = torch.tensor([example_rows()[3]["input_ids"]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.clone()


class LogitsOfCheckpoints(TrainerCallback):
    """What the model computes when a checkpoint has been written."""

    def __init__(self) -> None:
        self.logits: dict[int, torch.Tensor] = {}

    def on_save(self, args, state, control, model, **kwargs):
        self.logits[state.global_step] = logits_of(model)


def model_of(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapt(model, SETTINGS, seed=1)
    return model


def shared_base(folder: str) -> Path:
    base = Path(folder) / "base"
    if dist.get_rank() == 0:
        tiny_llama(VOCABULARY, hidden_size=16).save_pretrained(base)
    dist.barrier()
    return base


def losses_of(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def outcome(trainer: Any, callback: AdaLoraCallback) -> dict[str, Any]:
    return {
        "losses": losses_of(trainer),
        "patterns": patterns_of(callback.hooks),
        "adapters": adapters_of(callback.hooks),
        "num_held": sum(len(adapter.held()) for adapter in callback.hooks.method_step.adapters),
    }


def undisturbed_and_resumed(rank: int, world_size: int, folder: str, engine: str, *from_steps: int) -> dict[str, Any]:
    base = shared_base(folder)
    result: dict[str, Any] = {}

    def run(output: str, resume: str | None = None) -> Any:
        args = arguments(f"{folder}/{output}", world_size, engine, save_strategy="steps", save_steps=SAVE_STEPS)
        callback, model, recorder = AdaLoraCallback(SETTINGS), model_of(base), LogitsOfCheckpoints()
        trainer = trainer_of(model, args, callback, *[recorder] * (engine in ("single", "ddp")))
        trainer.train(resume_from_checkpoint=resume)
        result[output] = outcome(trainer, callback)
        return trainer, recorder

    trainer, recorder = run("whole")
    trainer.save_model(f"{folder}/saved")
    trainer.model_wrapped.eval()
    with torch.no_grad():
        logits = trainer.model_wrapped(IDS).logits
    for step in from_steps:
        run(f"from {step}", f"{folder}/whole/checkpoint-{step}")
    result["logits"] = {f"whole/checkpoint-{step}": x for step, x in recorder.logits.items()}
    result["logits"] |= {"saved": logits, f"whole/checkpoint-{STEPS}": logits}
    return result


def differences(rank: int, world_size: int, folder: str, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: difference(Path(folder, name), Path(folder, "base"), logits) for name, logits in expected.items()}


def difference(saved: Path, base: Path, logits: torch.Tensor) -> float:
    """The largest of a folder's logits, over all the ways to load it, from those expected."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = [PeftModel.from_pretrained(plain, saved), AutoPeftModelForCausalLM.from_pretrained(saved)]
    loaded.append(AutoModelForCausalLM.from_pretrained(saved))
    with torch.no_grad():
        return max((model.eval()(IDS).logits - logits).abs().max().item() for model in loaded)


@pytest.mark.parametrize(
    ("engine", "world_size"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)]
)
def test_folders_are_the_trained_model_and_runs_go_on_exactly(engine, world_size, tmp_path):
    before, compacted = 2 * SAVE_STEPS, STEPS - SAVE_STEPS
    assert before < FROZEN_FROM <= compacted
    results = run_ranks(world_size, undisturbed_and_resumed, str(tmp_path), engine, before, compacted, timeout=200)
    for result in results:
        whole = result["whole"]
        assert len(whole["losses"]) == STEPS and whole["num_held"] == TARGET == sum(
            list(whole["patterns"].values())[-1]
        )
        for step in (before, compacted):
            resumed = result[f"from {step}"]
            assert resumed["losses"] == whole["losses"] and resumed["patterns"] == whole["patterns"]
            assert resumed["num_held"] == TARGET
            for name, delta in whole["adapters"].items():
                assert torch.equal(delta, resumed["adapters"][name])
    # In a process of its own: with ZeRO-3 all processes would take part in loading.
    [found] = run_ranks(1, differences, str(tmp_path), results[0]["logits"])
    assert len(found) == (1 + STEPS // SAVE_STEPS if engine in ("single", "ddp") else 2) and max(found.values()) < 1e-5
    adapter = {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} - {"README.md"} == adapter
    kept = adapter | {"adalora", "scheduler.pt", "trainer_state.json"}  # no backbone, no optimizer of Trainer's
    kept |= {f"rng_state_{k}.pth" for k in range(world_size)} if world_size > 1 else {"rng_state.pth"}
    assert {path.name for path in (tmp_path / f"whole/checkpoint-{STEPS}").iterdir()} - {"README.md"} == kept


# ------------------------------------------------------------------------------------------------ every kind of folder


def every_kind_of_folder(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    """Folders that runs on one process leave, by what wrote them, and the logits of the model of that moment."""
    base, logits = shared_base(folder), {}

    def trained(output: str, **changes: Any) -> Any:
        args = arguments(f"{folder}/{output}", 1, **changes)
        recorder = LogitsOfCheckpoints()
        trainer = trainer_of(model_of(base), args, AdaLoraCallback(SETTINGS), recorder, eval_dataset=example_rows())
        trainer.train()
        logits.update({f"{output}/checkpoint-{step}": x for step, x in recorder.logits.items()})
        return trainer, logits_of(trainer.model)

    untrained = model_of(base)
    untrained.save_pretrained(f"{folder}/before training")
    logits["before training"] = logits_of(untrained)
    trainer, after = trained("model only", save_strategy="steps", save_steps=6, save_only_model=True)
    trainer.save_model()
    trainer.model.save_pretrained(f"{folder}/by the model")
    copy.deepcopy(trainer.model).save_pretrained(f"{folder}/by a copy")
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
        f"{folder}/by accelerate", state_dict=trainer.accelerator.get_state_dict(trainer.model)
    )
    logits |= dict.fromkeys(("model only", "by the model", "by a copy", "by accelerate"), after)
    trained("the best", save_strategy="best", metric_for_best_model="loss", eval_strategy="steps", eval_steps=5)
    trained("epochs", save_strategy="epoch", max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    save_adapter(trainer.adalora.hooks.updates(), Path(folder, "own"), str(base), None)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    load_adapter(loaded, Path(folder, "own"))
    loaded.requires_grad_(False).save_pretrained(f"{folder}/of a loaded adapter")
    loaded.save_pretrained(f"{folder}/of a loaded adapter")  # in the place of the one that is there
    logits["of a loaded adapter"] = after
    return logits


def test_every_kind_of_folder_is_the_model_of_its_moment(tmp_path):
    [logits] = run_ranks(1, every_kind_of_folder, str(tmp_path), timeout=300)
    folders = {path.parent for path in tmp_path.rglob("*") if path.name in MODEL_FILES and "base" not in path.parts}
    assert {str(folder.relative_to(tmp_path)) for folder in folders} - {"own"} == logits.keys() and len(logits) > 10
    [found] = run_ranks(1, differences, str(tmp_path), logits, timeout=300)
    assert max(found.values()) < 1e-5
    moved = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) - logits["by the model"]
    assert moved.abs().max() > 0.1  # what a folder without its adapter would be off by
