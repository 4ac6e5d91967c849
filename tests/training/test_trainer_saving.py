"""What ``Trainer`` leaves of a run with adapters: folders that PEFT loads as the trained model, and exact resumes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
)

from adalora_dist.artifacts.adapted_model import adapt
from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.training.trainer_callback import AdaLoraCallback
from tests.support.limits import HANG_SECONDS
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import tiny_llama
from tests.support.trainer_folders import IDS, LogitsOfCheckpoints, differences, logits_of, model_of, shared_base
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
WITH_HEAD = SETTINGS.model_copy(update={"train_modules": ("task-head",)})
FROZEN_FROM = STEPS - SETTINGS.final_steps + 1  # steps done when the pattern is final
SAVE_STEPS = 4


def losses_of(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def outcome(trainer: Any, callback: AdaLoraCallback) -> dict[str, Any]:
    return {
        "losses": losses_of(trainer),
        "patterns": patterns_of(callback.hooks),
        "adapters": adapters_of(callback.hooks),
        "num_held": sum(len(adapter.held()) for adapter in callback.hooks.method_step.adapters),
    }


OPTIMIZERS: dict[str, Any] = {
    "adamw": None,
    "sgd": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 2e-2}),
    "adagrad": (torch.optim.Adagrad, {"lr": 2e-2}),
}


def undisturbed_and_resumed(
    rank: int, world_size: int, folder: str, engine: str, optimizer: str, *from_steps: int
) -> dict[str, Any]:
    base = shared_base(folder)
    result: dict[str, Any] = {}

    def run(output: str, resume: str | None = None) -> Any:
        args = arguments(f"{folder}/{output}", world_size, engine, save_strategy="steps", save_steps=SAVE_STEPS)
        callback, model, recorder = AdaLoraCallback(SETTINGS), model_of(base), LogitsOfCheckpoints()
        trainer = trainer_of(
            model, args, callback, *[recorder] * (engine in ("single", "ddp")),
            optimizer_cls_and_kwargs=OPTIMIZERS[optimizer],
        )  # fmt: skip
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


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("engine", "world_size", "optimizer"),
    [
        ("single", 1, "adamw"),
        ("fsdp2", 2, "adamw"),
        ("zero3", 2, "adamw"),
        *(slow(engine, 2, "adamw") for engine in ("ddp", "zero1", "zero2")),
        *(slow(engine, 3, "adamw") for engine in ("ddp", "fsdp2", "zero2", "zero3")),
        *(slow("single", 1, optimizer) for optimizer in ("sgd", "rmsprop", "adagrad")),
        *(slow(engine, 2, name) for engine in ("ddp", "fsdp2") for name in ("sgd", "rmsprop", "adagrad")),
        *(slow(engine, 2, "rmsprop") for engine in ("zero1", "zero2", "zero3")),
    ],
)
def test_folders_are_the_trained_model_and_runs_go_on_exactly(engine, world_size, optimizer, tmp_path):
    before, compacted = 2 * SAVE_STEPS, STEPS - SAVE_STEPS
    assert before < FROZEN_FROM <= compacted
    of_run = str(tmp_path), engine, optimizer, before, compacted
    results = run_ranks(world_size, undisturbed_and_resumed, *of_run, timeout=3 * HANG_SECONDS)
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


# ---------------------------------------------------------------------------------- heads, TRL, and what is refused


def classifier_of(base: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=3)
    adapt(model, WITH_HEAD, seed=1)
    model.config.pad_token_id, model.accepts_loss_kwargs = 0, False
    return model


def trained_classifier(rank: int, world_size: int, folder: str, engine: str) -> torch.Tensor:
    """With a head that is trained in full, and early stopping that counts from the freeze on."""
    args = arguments(
        f"{folder}/run", world_size, engine, learning_rate=1e-3, save_strategy="steps", save_steps=1,
        save_total_limit=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="flat",
    )  # fmt: skip
    rows = [{"input_ids": row["input_ids"][:5], "labels": k % 3} for k, row in enumerate(example_rows())]
    callback = AdaLoraCallback(WITH_HEAD)
    trainer = Trainer(
        model=classifier_of(shared_base(folder)), args=args, train_dataset=rows * 5, eval_dataset=rows,
        callbacks=[callback, EarlyStoppingCallback(early_stopping_patience=2)], compute_metrics=lambda _: {"flat": 1.0},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == FROZEN_FROM and trainer.state.global_step == FROZEN_FROM + 2
    assert sum(callback.hooks.rank_pattern().values()) == TARGET
    trainer.save_model(f"{folder}/saved")
    trainer.model_wrapped.eval()
    with torch.no_grad():
        return trainer.model_wrapped(IDS).logits


def loaded_classifier(rank: int, world_size: int, folder: str) -> list[torch.Tensor]:
    saved = Path(folder, "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(Path(folder, "base"), dtype=torch.float32, num_labels=3)
    loaded = PeftModel.from_pretrained(plain, saved)
    loaded.config.pad_token_id = 0
    again = AutoPeftModelForSequenceClassification.from_pretrained(saved, num_labels=3)
    again.config.pad_token_id = 0
    best = PeftModel.from_pretrained(copy.deepcopy(plain), next(Path(folder, "run").glob(f"checkpoint-{FROZEN_FROM}")))
    best.config.pad_token_id = 0
    return [logits_of(model) for model in (loaded, again, best)]


@pytest.mark.parametrize(("engine", "world_size"), [("single", 1), pytest.param("zero3", 2, marks=pytest.mark.slow)])
def test_a_head_is_saved_and_early_stopping_counts_from_the_freeze_on(engine, world_size, tmp_path):
    logits = run_ranks(world_size, trained_classifier, str(tmp_path), engine, timeout=3 * HANG_SECONDS)[0]
    for loaded in run_ranks(1, loaded_classifier, str(tmp_path))[0]:
        torch.testing.assert_close(loaded, logits, rtol=0, atol=5e-5)


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused_resumes(rank: int, world_size: int, folder: str) -> dict[str, str]:
    base = shared_base(folder)

    def trainer(settings: AdaLoraConfig = SETTINGS, model: Any = None, **changes: Any) -> Any:
        args = arguments(f"{folder}/run", 1, **{"save_strategy": "steps", "save_steps": 10, **changes})
        return trainer_of(model_of(base) if model is None else model, args, AdaLoraCallback(settings))

    def resumed(number: int, damage: Callable[[Path], Any], **changes: Any) -> str:
        checkpoint = Path(folder, f"copy {number}", f"checkpoint-{STEPS // 2}")
        shutil.copytree(f"{folder}/run/checkpoint-{STEPS // 2}", checkpoint)
        damage(checkpoint)
        return error_of(lambda: trainer(**changes).train(resume_from_checkpoint=str(checkpoint)))

    def flip(checkpoint: Path) -> None:
        [file] = checkpoint.glob("adalora/*/shard-*")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    def of_another_step(checkpoint: Path) -> None:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"global_step": 3}))

    def other_base() -> Any:
        with torch.no_grad():
            model = tiny_llama(VOCABULARY, hidden_size=16)
            model.lm_head.weight.add_(1.0)
        model.save_pretrained(f"{folder}/other base")
        return model_of(Path(folder, "other base"))

    trainer().train()
    others = SETTINGS.model_copy(update={"beta1": 0.5})
    late = trainer()
    late.callback_handler.pop_callback(AdaLoraCallback)
    late = Trainer(model=late.model, args=late.args, train_dataset=late.train_dataset)
    late.add_callback(AdaLoraCallback(SETTINGS))
    part = tiny_llama(VOCABULARY, hidden_size=16)
    adapt(part.model, SETTINGS, seed=1)
    return {
        "damaged": resumed(1, flip),
        "missing": resumed(2, lambda checkpoint: shutil.rmtree(checkpoint / "adalora")),
        "unfinished": resumed(3, lambda checkpoint: next(checkpoint.glob("adalora/*/manifest.json")).unlink()),
        "of another step": resumed(4, of_another_step),
        "without scheduler": resumed(5, lambda checkpoint: (checkpoint / "scheduler.pt").unlink()),
        "other settings": resumed(6, lambda _: None, settings=others),
        "other length": resumed(7, lambda _: None, max_steps=STEPS + 1),
        "other base": resumed(8, lambda _: None, model=other_base()),
        "added late": error_of(lambda: late.train(resume_from_checkpoint=f"{folder}/run/checkpoint-{STEPS}")),
        "a part of the model": error_of(trainer(model=part).train),
        "no option": error_of(lambda: model_of(base).save_pretrained(f"{folder}/x", push_to_hub=True)),
        "pickles": error_of(lambda: model_of(base).save_pretrained(f"{folder}/x", safe_serialization=False)),
        "not whole": error_of(lambda: model_of(base).save_pretrained(f"{folder}/x", state_dict={})),
    }


def test_what_cannot_be_resumed_or_saved_is_refused_by_name(tmp_path):
    [errors] = run_ranks(1, refused_resumes, str(tmp_path))
    expected = {
        "damaged": "is not what was written: its SHA-256 differs",
        "missing": "has no adalora/ with the adapters' state",
        "unfinished": "manifest.json cannot be read",
        "of another step": f"is of step {STEPS // 2}, and trainer_state.json beside it of step 3",
        "without scheduler": "scheduler.pt is missing",
        "other settings": "beta1 0.85 -> 0.5",
        "other length": f"optimizer steps {STEPS} -> {STEPS + 1}",
        "other base": "is not the backbone of",
        "a part of the model": "a part was adapted: save that part",
        "no option": "push_to_hub=True",
        "pickles": "safe_serialization=False",
        "not whole": "state_dict lacks",
    }
    for case, words in expected.items():
        assert errors[case].startswith("UserError: ") and words in errors[case], (case, errors[case])
    assert "no error" not in errors["added late"]
