"""``AdaLoraCallback``: in transformers' Trainer and TRL's SFTTrainer, ranks are those of the project's own loop."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import EarlyStoppingCallback, TrainerCallback

from adalora_dist.artifacts.export import load_adapter, save_adapter
from adalora_dist.methods.inject import adapt
from adalora_dist.training.trainer_callback import AdaLoraCallback
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama
from tests.support.trainer_runs import (
    GLOBAL_BATCH,
    SETTINGS,
    STEPS,
    VOCABULARY,
    adapters_of,
    arguments,
    by_own_loop,
    by_trainer,
    example_rows,
    folder_of_rank_0,
    logged,
    model_with_adapters,
    one_process,
    trainer_of,
)

NUM_MATRICES = 14  # two Llama layers
TRIPLETS, TARGET = 3 * NUM_MATRICES, 21
FROZEN_FROM = STEPS - SETTINGS.final_steps + 1  # steps done when the pattern is final

own_loop = lru_cache(lambda accumulation: run_ranks(1, by_own_loop, accumulation)[0])

RUNS = [
    ("single", 1, 1, "LlamaForCausalLM"),
    ("single", 1, 2, "LlamaForCausalLM"),
    pytest.param(("ddp", 2, 1, "DistributedDataParallel"), marks=pytest.mark.slow),
    ("ddp", 2, 2, "DistributedDataParallel"),
    ("fsdp2", 2, 2, "FSDPModule"),
    pytest.param(("zero1", 2, 2, "DeepSpeedEngine"), marks=pytest.mark.slow),
    pytest.param(("zero2", 2, 1, "DeepSpeedEngine"), marks=pytest.mark.slow),
    ("zero2", 2, 2, "DeepSpeedEngine"),
    ("zero3", 2, 2, "DeepSpeedEngine"),
    # As large models are run: recomputed activations, whose wrappers change module names, and zero.Init.
    ("fsdp2", 2, 1, "FSDPModule", "checkpointing"),
    ("zero3", 2, 1, "DeepSpeedEngine", "zero_init"),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(str(part) for part in run if part != run[3]))
def test_same_patterns_and_losses_as_the_recipes_loop(run):
    engine, world_size, accumulation, wrapped, *options = run
    expected = own_loop(accumulation)
    results = run_ranks(world_size, by_trainer, engine, accumulation, *options)
    assert [words(result["said"]) for result in results] == [words(expected["said"])] + [[]] * (world_size - 1)
    for result in results:
        assert result["num_processes"] == world_size and wrapped in result["wrapped"]
        assert result["patterns"] == expected["patterns"]
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=0)
        assert result["adapters"].keys() == expected["adapters"].keys()
        for name, delta in expected["adapters"].items():
            torch.testing.assert_close(result["adapters"][name], delta, rtol=1e-3, atol=1e-5)
        assert result["budgets"][0] == TRIPLETS and result["budgets"][-1] == TARGET
        assert result["mean_ranks"] == [budget / NUM_MATRICES for budget in result["budgets"]]


def words(lines: list[str]) -> list[str]:
    """Without their numbers, which engines round differently."""
    return [re.sub(r"\d\.\d+", "N", line) for line in lines]


def noticed(rank: int, world_size: int, folder: str, begins_at_0: bool) -> list[list[str]]:
    """What is said at the start of pruning: of a whole run, of one continued before it, and of one continued after."""
    settings = SETTINGS.model_copy(update={"init": None, "initial_warmup_steps": 0 if begins_at_0 else 3})
    said = []
    for resume in (None, 2, 4):
        callback = AdaLoraCallback(settings)
        args = arguments(f"{folder}/run", 1, save_strategy="steps", save_steps=2, learning_rate=1e-5, warmup_steps=5)
        trainer = trainer_of(model_with_adapters(settings), args, callback)
        with logged() as lines:
            trainer.train(resume_from_checkpoint=f"{folder}/run/checkpoint-{resume}" if resume else None)
        said.append(lines)
    return said


def test_pruning_of_noise_is_warned_of_in_trainer_too(tmp_path):
    [[whole, before, after]] = run_ranks(1, noticed, str(tmp_path), False)
    [line] = whole
    assert line.startswith(f"step 4/{STEPS}: warning: pruning begins before triplets have a signal: the update has ")
    assert line.endswith("use start matched or a higher learning_rate or more initial_warmup_steps than 3")
    assert before == [line] and after == []


def test_a_warm_up_from_0_that_pruning_begins_in(tmp_path):
    [[whole, *continued]] = run_ranks(1, noticed, str(tmp_path), True)
    assert "signal: the update has grown to 0 of" in whole[0] and continued == [[], []]


def test_the_own_loop_is_worth_comparing_with():
    result = own_loop(1)
    patterns = list(result["patterns"].values())
    assert len(patterns) == 6 and len({tuple(p) for p in patterns}) >= 5 and sum(patterns[-1]) == TARGET
    assert result["losses"][-1] < 0.8 * result["losses"][0]


# ------------------------------------------------------------------------------------------------ checkpoints


FROZEN_CHECKPOINTS = dict(
    save_strategy="steps", save_steps=1, save_total_limit=2, eval_strategy="steps", eval_steps=1,
    eval_delay=FROZEN_FROM, load_best_model_at_end=True, metric_for_best_model="loss",
    greater_is_better=True,  # the worst, so that the checkpoint to load is not the last
)  # fmt: skip


class Recorder(TrainerCallback):
    """A tracker behind the callback: what it gets to log, and the adapters of each frozen step."""

    def __init__(self, callback: AdaLoraCallback) -> None:
        self.callback = callback
        self.logs: list[dict[str, float]] = []
        self.adapters: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= FROZEN_FROM:
            self.adapters[state.global_step] = adapters_of(self.callback.hooks)

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def best_model(rank: int, world_size: int, engine: str, eval_delay: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as own_folder:
        folder = folder_of_rank_0(own_folder)
        args = arguments(folder, world_size, engine, **FROZEN_CHECKPOINTS | {"eval_delay": eval_delay})
        callback, model = AdaLoraCallback(SETTINGS), model_with_adapters()
        recorder = Recorder(callback)
        trainer = trainer_of(model, args, callback, recorder, eval_dataset=example_rows())
        trainer.train()
        adapters = callback.hooks.updates()
        if trainer.is_world_process_zero():
            save_adapter(adapters, Path(folder) / "adapter", "tiny", None)
        dist.barrier()
        again = tiny_llama(VOCABULARY, hidden_size=16)
        load_adapter(again, Path(folder) / "adapter")
        ids = torch.tensor([example_rows()[3]["input_ids"]])
        trainer.model_wrapped.eval()
        with torch.no_grad():
            difference = again(ids).logits - trainer.model_wrapped(ids).logits
        dist.barrier()
        return {
            "best_step": trainer.state.best_global_step,
            "exported": adapters_of(callback.hooks),
            "recorded": recorder.adapters,
            "logs": recorder.logs,
            "difference": difference.abs().max().item(),
        }


@pytest.mark.parametrize(
    ("engine", "world_size", "eval_delay"),
    [("single", 1, FROZEN_FROM), ("single", 1, 0), ("zero2", 2, FROZEN_FROM), ("fsdp2", 2, 0)]
    + [pytest.param("zero3", 2, 0, marks=pytest.mark.slow)],
)
def test_best_model_logs_and_saved_adapter(engine, world_size, eval_delay):
    for result in run_ranks(world_size, best_model, engine, eval_delay):
        assert FROZEN_FROM <= result["best_step"] < STEPS
        for name, delta in result["exported"].items():
            assert torch.equal(delta, result["recorded"][result["best_step"]][name])
        assert any(not torch.equal(d, result["recorded"][STEPS][name]) for name, d in result["exported"].items())
        assert result["difference"] < 1e-4
        losses = [entry for entry in result["logs"] if "loss" in entry]
        assert len(losses) == STEPS and all({"budget", "mean_rank"} <= entry.keys() for entry in losses)
        evaluations = [entry for entry in result["logs"] if "eval_loss" in entry]
        assert evaluations and all("budget" not in entry for entry in evaluations)


def error_of(trainer: Any, **kwargs: Any) -> str:
    return error_in(lambda: trainer.train(**kwargs))


def error_in(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(rank: int, world_size: int, folder: str) -> dict[str, str]:
    def trainer(**changes: Any) -> Any:
        args = arguments(folder, 1, **changes)
        return trainer_of(model_with_adapters(), args, AdaLoraCallback(SETTINGS), eval_dataset=example_rows())

    served = trainer()
    served.train()
    of_a_search = trainer()
    of_a_search.state.is_hyper_param_search = True
    control = of_a_search.control
    of_two_gpus = trainer()
    of_two_gpus.args._n_gpu = 2
    with_peft = trainer()
    with_peft.model.peft_config = {}
    alone = AdaLoraCallback(SETTINGS)
    best = FROZEN_CHECKPOINTS
    return {
        "of a search": error_in(
            lambda: of_a_search.callback_handler.on_train_begin(of_a_search.args, of_a_search.state, control)
        ),
        "two GPUs in one process": error_of(of_two_gpus),
        "called again": error_of(served),
        "PEFT's adapters": error_of(with_peft),
        "no Trainer": error_in(lambda: alone.on_train_begin(served.args, served.state, served.control)),
        "never a candidate": error_of(trainer(**best | {"eval_steps": 13, "save_steps": 13, "eval_delay": 0})),
        "delayed beyond the end": error_of(trainer(**best | {"eval_delay": STEPS + 1})),
        "best of models alone": error_of(trainer(**best | {"save_only_model": True})),
        "another optimizer": error_of(trainer(optim="adafactor")),
        "another optimizer, with checkpoints": error_of(
            trainer(optim="adafactor", save_strategy="steps", save_steps=10)
        ),
        "no adapters": error_of(trainer_of(tiny_llama(VOCABULARY), arguments(folder, 1), AdaLoraCallback(SETTINGS))),
    }


def test_refusals(tmp_path):
    [result] = run_ranks(1, refusals, str(tmp_path))
    assert "UserError: 2 GPUs in one process" in result["two GPUs in one process"]
    assert "UserError: hyperparameter_search trains several models" in result["of a search"]
    assert "UserError: train() was called again" in result["called again"]
    assert "UserError: the model has PEFT's adapters" in result["PEFT's adapters"]
    assert "UserError: AdaLoraCallback does not know its Trainer" in result["no Trainer"]
    for case in ("never a candidate", "delayed beyond the end"):
        assert "UserError: load_best_model_at_end=True" in result[case]
        assert f"no evaluation falls into steps {FROZEN_FROM} to {STEPS}" in result[case]
    assert "save_only_model=True" in result["best of models alone"]
    assert "UserError: the optimizer is Adafactor (optim='adafactor')" in result["another optimizer"]
    assert result["another optimizer"].endswith("or compact=False in AdaLoraConfig")
    ending = "save_only_model=True and compact=False in AdaLoraConfig"
    assert result["another optimizer, with checkpoints"].endswith(ending)
    assert "UserError: the model has no adapters" in result["no adapters"]


def unkept_state(rank: int, world_size: int, folder: str, optimizer: str) -> dict[str, Any]:
    settings = SETTINGS.model_copy(update={"compact": False})
    args = arguments(folder, 1, optim=optimizer, save_strategy="steps", save_steps=10, save_only_model=True)
    trainer = trainer_of(model_with_adapters(settings), args, AdaLoraCallback(settings))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"ranks": sum(trainer.adalora.hooks.rank_pattern().values()), "losses": losses}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_bnb_8bit"])
def test_optimizers_whose_state_is_not_kept_train_without_it(optimizer, tmp_path):
    [result] = run_ranks(1, unkept_state, str(tmp_path), optimizer)
    assert result["ranks"] == TARGET and result["losses"][-1] < 0.9 * result["losses"][0]


# ------------------------------------------------------------------------------------------------ missed budgets


class ShadowedAdamW(torch.optim.AdamW):
    """Looks like a wrapper of another optimizer and steps by itself."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params, lr=1e-3)
        self.optimizer = torch.optim.AdamW(params, lr=1e-3)


def runs_that_miss_their_budget(rank: int, world_size: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        result = {}
        for name, steps in (("never stepped", STEPS), ("noticed early", 10 * STEPS)):
            model = model_with_adapters()
            optimizer = ShadowedAdamW(p for p in model.parameters() if p.requires_grad)
            args = arguments(folder, 1, max_steps=steps)
            trainer = trainer_of(model, args, AdaLoraCallback(SETTINGS), optimizers=(optimizer, None))
            result[name] = error_of(trainer)
            assert trainer.state.global_step <= 33
        args = arguments(
            folder, 1, learning_rate=0.0, save_strategy="best", eval_strategy="steps", eval_steps=2,
            metric_for_best_model="loss",
        )  # fmt: skip
        callbacks = AdaLoraCallback(SETTINGS), EarlyStoppingCallback(early_stopping_patience=2)
        result["stopped early"] = error_of(
            trainer_of(model_with_adapters(), args, *callbacks, eval_dataset=example_rows())
        )
        return result


def test_a_run_that_misses_its_budget_raises():
    [result] = run_ranks(1, runs_that_miss_their_budget)
    assert "RuntimeError: the method was never called" in result["never stepped"]
    assert "RuntimeError: 33 training steps were counted" in result["noticed early"]
    assert "RuntimeError: the budget was not reached" in result["stopped early"]
    assert f"ended after step 6 of the {STEPS}" in result["stopped early"]


def test_the_hooks_are_there_once_training_has_begun():
    with pytest.raises(RuntimeError, match="once trainer.train"):
        _ = AdaLoraCallback(SETTINGS).hooks


# ------------------------------------------------------------------------------------------------ TRL


def by_sft_trainer(rank: int, world_size: int) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    one_process()
    tokenizer = byte_tokenizer()
    model = tiny_llama(len(tokenizer), hidden_size=16)
    adapt(model, SETTINGS)
    text = [{"text": f"{a} plus {b} is {a + b}"} for a in range(8) for b in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH, learning_rate=5e-2,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, bf16=False,
        )  # fmt: skip
        callback = AdaLoraCallback(SETTINGS)
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(text), processing_class=tokenizer,
            callbacks=[callback],
        )  # fmt: skip
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "pattern": callback.hooks.method_step.rank_pattern(),
            "losses": [entry["loss"] for entry in logs],
            "budgets": [entry["budget"] for entry in logs],
            "num_triplets": sum(a.lam.numel() for a in callback.hooks.updates()),
        }


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_sft_trainer():
    [result] = run_ranks(1, by_sft_trainer)
    assert len(result["pattern"]) == NUM_MATRICES and sum(result["pattern"].values()) == TARGET
    assert result["num_triplets"] == TARGET
    assert result["budgets"][0] == TRIPLETS and result["budgets"][-1] == TARGET
    assert result["losses"][-1] < 0.8 * result["losses"][0]
