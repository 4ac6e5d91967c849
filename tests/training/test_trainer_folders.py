"""Every kind of folder that ``Trainer`` leaves of a run with adapters is the model of its moment, or is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, TrainerCallback

from adalora_dist.artifacts.export import load_adapter, save_adapter
from adalora_dist.training.trainer_callback import AdaLoraCallback
from tests.support.ranks import run_ranks
from tests.support.trainer_folders import LogitsOfCheckpoints, differences, logits_of, model_of, shared_base
from tests.support.trainer_runs import SETTINGS, STEPS, arguments, example_rows, trainer_of

MODEL_FILES = {"config.json", "model.safetensors", "pytorch_model.bin", "adapter_config.json", "adapter.json"}
"""By which loaders take a folder for a model or an adapter."""


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

    class MidTraining(TrainerCallback):
        """Has the Trainer save while it trains, as users' callbacks do."""

        trainer: Any

        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 7:
                self.trainer.save_model(f"{folder}/mid-training")
                logits["mid-training"] = logits_of(model)
                model.train()

    untrained = model_of(base)
    untrained.save_pretrained(f"{folder}/before training")
    logits["before training"] = logits_of(untrained)
    trainer = trainer_of(model_of(base), arguments(f"{folder}/evaluated", 1), AdaLoraCallback(SETTINGS),
                         eval_dataset=example_rows())  # fmt: skip
    assert trainer.evaluate()["eval_loss"] > 0 and trainer.predict(example_rows()[:2]).metrics
    trainer.save_model(f"{folder}/by a Trainer that evaluates")
    logits["by a Trainer that evaluates"] = logits_of(trainer.model)
    args = arguments(
        f"{folder}/smoothed", 1, "single", 2, label_smoothing_factor=0.1, save_strategy="steps", save_steps=7,
        save_total_limit=1, auto_find_batch_size=True,
    )  # fmt: skip
    mid_training = MidTraining()
    mid_training.trainer = trainer = trainer_of(model_of(base), args, AdaLoraCallback(SETTINGS), mid_training)
    trainer.train()
    logits[f"smoothed/checkpoint-{STEPS}"] = logits_of(trainer.model)
    args = arguments(f"{folder}/bf16", 1, bf16=True, save_strategy="steps", save_steps=STEPS)
    trainer = trainer_of(model_of(base), args, AdaLoraCallback(SETTINGS))
    trainer.train()
    without_autocast = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    logits[f"bf16/checkpoint-{STEPS}"] = logits_of(without_autocast)
    trainer.accelerator.save_model(trainer.model, f"{folder}/raw")
    trainer, after = trained("model only", save_strategy="steps", save_steps=6, save_only_model=True)
    trainer.save_model()
    trainer.model.save_pretrained(f"{folder}/by the model")
    copy.deepcopy(trainer.model).save_pretrained(f"{folder}/by a copy")
    trainer.model.save_pretrained(f"{folder}/by its state", state_dict=trainer.model.state_dict())
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
        f"{folder}/by accelerate", state_dict=trainer.accelerator.get_state_dict(trainer.model)
    )
    logits |= dict.fromkeys(("model only", "by the model", "by a copy", "by its state", "by accelerate"), after)
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
    [logits] = run_ranks(1, every_kind_of_folder, str(tmp_path))
    folders = {path.parent for path in tmp_path.rglob("*") if path.name in MODEL_FILES and "base" not in path.parts}
    names = {str(folder.relative_to(tmp_path)) for folder in folders}
    assert names - {"own", "raw"} == logits.keys() and len(logits) > 10
    [found] = run_ranks(1, differences, str(tmp_path), logits)
    assert max(found.values()) < 1e-5
    others = {path.parent for path in tmp_path.rglob("*") if path.is_file() and "base" not in path.parts} - {
        tmp_path / name for name in logits
    }
    assert len(others) > 5  # raw parameters, this project's own form, states of checkpoints
    for folder in others:
        for way in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
            with pytest.raises((OSError, ValueError)):
                way.from_pretrained(folder)
    moved = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) - logits["by the model"]
    assert moved.abs().max() > 0.1  # what a folder without its adapter would be off by


def by_the_main_process(rank: int, world_size: int, folder: str) -> torch.Tensor:
    """As many do under DDP: one process saves, the others go on."""
    trainer = trainer_of(model_of(shared_base(folder)), arguments(f"{folder}/run", world_size, "ddp"),
                         AdaLoraCallback(SETTINGS))  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        trainer.save_model(f"{folder}/saved")
    return logits_of(trainer.model)


@pytest.mark.slow
def test_one_process_may_save_what_all_have(tmp_path):
    logits = run_ranks(2, by_the_main_process, str(tmp_path))[0]
    [found] = run_ranks(1, differences, str(tmp_path), {"saved": logits})
    assert found["saved"] < 1e-5


def compiled(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    """With the tracing of a compiler, and eager kernels."""
    logits: dict[str, torch.Tensor] = {}
    for name, resume in (("whole", None), ("resumed", f"{folder}/whole/checkpoint-10")):
        args = arguments(f"{folder}/{name}", 1, torch_compile_backend="eager", save_strategy="steps", save_steps=10)
        trainer = trainer_of(model_of(shared_base(folder)), args, AdaLoraCallback(SETTINGS))
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(f"{folder}/{name} saved")
        logits |= dict.fromkeys((f"{name} saved", f"{name}/checkpoint-{STEPS}"), logits_of(trainer.model))
    return logits


@pytest.mark.slow
def test_compiled_models_are_saved_and_resumed(tmp_path):
    [logits] = run_ranks(1, compiled, str(tmp_path), timeout=400)
    assert torch.equal(logits["whole saved"], logits["resumed saved"])
    [found] = run_ranks(1, differences, str(tmp_path), logits)
    assert max(found.values()) < 1e-5
