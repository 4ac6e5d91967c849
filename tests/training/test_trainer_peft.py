"""Trainers that were made with PEFT's adapters, TRL's ``peft_config`` among them, and a reference in the same model."""

from __future__ import annotations

import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer

from adalora_dist import AdaLoraCallback, AdaLoraConfig, adapt, without_adapters
from tests.support.limits import HANG_SECONDS
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama
from tests.support.trainer_runs import (
    STEPS,
    VOCABULARY,
    adapters_of,
    arguments,
    one_process,
    patterns_of,
    trainer_of,
)

IDS = torch.arange(3, 11).view(1, 8)
NUM_MATRICES = 14
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def adalora_of_peft() -> Any:
    return peft.AdaLoraConfig(
        init_r=3, target_r=2, tinit=3, tfinal=6, total_step=STEPS, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.clone()


def error_of(action: Any) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def by_trainer(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """LoRA with a budget, and what is refused."""
    args = arguments(f"{folder}/run", 1, save_strategy="steps", save_steps=8)
    base = Path(folder, "base")
    tiny_llama(VOCABULARY, hidden_size=16).save_pretrained(base)

    def theirs(**fields: Any) -> Any:
        lora = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **fields})
        return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)

    def trainer(model: Any, *settings: Any, **options: Any) -> Any:
        return trainer_of(model, args, AdaLoraCallback(*settings, **options.pop("named", {})), **options)

    def added_late() -> Trainer:
        late = trainer_of(theirs(), args)
        AdaLoraCallback(target_rank=2).attach_to(late)
        return late

    found: dict[str, Any] = {}
    for name, make in {
        "whole": lambda: trainer(theirs(), named={"target_rank": 2}),
        "resumed": lambda: trainer(theirs(), named={"target_rank": 2}),
        "late": added_late,
        "by config": lambda: trainer(theirs(), AdaLoraConfig(init_rank=3, target_rank=2, alpha=6)),
    }.items():
        torch.manual_seed(5)  # PEFT's A
        run = make()
        run.train(resume_from_checkpoint=f"{folder}/run/checkpoint-8" if name == "resumed" else None)
        found[name] = logits_of(run.model)
        found[f"{name}: ranks"] = sum(run.adalora.hooks.rank_pattern().values())
    run.save_model(f"{folder}/adapter")
    found["loaded"] = logits_of(peft.AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter"))
    wrapped = theirs()
    optimizer = torch.optim.AdamW(p for p in wrapped.parameters() if p.requires_grad)
    found["errors"] = {
        "optimizers": error_of(lambda: trainer(wrapped, named={"target_rank": 2}, optimizers=(optimizer, None))),
        "no budget": error_of(lambda: trainer(theirs())),
        "both": error_of(lambda: trainer(theirs(), AdaLoraConfig(), named={"target_rank": 2})),
        "no config": error_of(lambda: trainer(AutoModelForCausalLM.from_pretrained(base))),
        "model_init": error_of(
            lambda: trainer(None, named={"target_rank": 2}, model_init=lambda: theirs()).train()
        ),
    }  # fmt: skip
    return found


def test_lora_with_a_budget_under_trainer(tmp_path: Path) -> None:
    [found] = run_ranks(1, by_trainer, str(tmp_path))
    for name in ("whole", "resumed", "late", "by config"):
        assert found[f"{name}: ranks"] == 2 * NUM_MATRICES
        assert torch.equal(found[name], found["whole"])
    torch.testing.assert_close(found["loaded"], found["by config"], rtol=0, atol=5e-5)
    words = {
        "optimizers": "was made for PEFT's parameters",
        "no budget": "a budget below its r",
        "both": "config and target_rank: give one of the two",
        "no config": "the model has none: call adapt(model, config)",
        "model_init": "put in by model_init or after the Trainer was made",
    }
    assert {name: found["errors"][name] for name in words if words[name] not in found["errors"][name]} == {}


def written_base(rank: int, folder: str) -> tuple[Any, Path]:
    """A tokenizer, and the folder of a model with it. Collective."""
    tokenizer, base = byte_tokenizer(), Path(folder, "base")
    if rank == 0:
        tokenizer.save_pretrained(base)
        tiny_llama(len(tokenizer), hidden_size=16).save_pretrained(base)
    dist.barrier()
    return tokenizer, base


def by_sft_trainer(rank: int, world_size: int, folder: str, engine: str) -> dict[str, Any]:
    """PEFT's configuration as it is, in the place where TRL wants it: undisturbed, and resumed twice."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer, base = written_base(rank, folder)
    text = Dataset.from_list([{"text": f"{a} plus {b} is {a + b}"} for a in range(8) for b in range(4)])
    found: dict[str, Any] = {}

    def run(output: str, resume: str | None = None) -> Any:
        args = arguments(
            f"{folder}/{output}", world_size, engine, kind=SFTConfig, learning_rate=5e-2, save_strategy="steps",
            save_steps=8, bf16=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # total_step
            trainer = SFTTrainer(
                model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=args, train_dataset=text,
                processing_class=tokenizer, peft_config=adalora_of_peft(), callbacks=[AdaLoraCallback()],
            )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        hooks = trainer.adalora.hooks
        logs = [record for record in trainer.state.log_history if "loss" in record]
        found[output] = {
            "losses": {record["step"]: record["loss"] for record in logs},
            "budgets": [record["budget"] for record in logs],
            "patterns": patterns_of(hooks),
            "adapters": adapters_of(hooks),
            "held": sum(len(adapter.held()) for adapter in hooks.method_step.adapters),
        }
        return trainer

    trainer = run("whole")
    trainer.save_model(f"{folder}/adapter")
    trainer.model_wrapped.eval()
    with torch.no_grad():
        found["logits"] = trainer.model_wrapped(IDS).logits.clone()
    found["config"] = trainer.adalora.config
    for step in (8, 16):
        run(f"from {step}", f"{folder}/whole/checkpoint-{step}")
    return found


def loaded(rank: int, world_size: int, folder: str) -> list[torch.Tensor]:
    adapters = [f"{folder}/adapter", f"{folder}/whole/checkpoint-{STEPS}"]
    ways = [(peft.AutoPeftModelForCausalLM, path) for path in adapters] + [(AutoModelForCausalLM, adapters[0])]
    return [logits_of(way.from_pretrained(path)) for way, path in ways]


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
)
def test_peft_config_as_it_is_in_sft_trainer(engine: str, world_size: int, tmp_path: Path) -> None:
    for found in run_ranks(world_size, by_sft_trainer, str(tmp_path), engine):
        whole = found["whole"]
        assert whole["budgets"][0] == 3 * NUM_MATRICES and whole["budgets"][-1] == 2 * NUM_MATRICES == whole["held"]
        assert found["config"].start == "paper" and found["config"].final_steps == 6
        for step in (8, 16):
            resumed = found[f"from {step}"]
            assert resumed["losses"] == whole["losses"] and resumed["patterns"] == whole["patterns"]
            assert resumed["held"] == whole["held"]
            for name, delta in whole["adapters"].items():
                assert torch.equal(delta, resumed["adapters"][name])
    [folders] = run_ranks(1, loaded, str(tmp_path))
    for logits in folders:
        torch.testing.assert_close(logits, found["logits"], rtol=0, atol=5e-5)


def by_dpo(rank: int, world_size: int, folder: str, engine: str) -> dict[str, Any]:
    """Preferences from PEFT's configuration, over a base that is not what its folder has, as merged ones are not."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer, base = written_base(rank, folder)
    rows = [{"prompt": f"{a}+1=", "chosen": f"{a + 1}", "rejected": f"{a + 2}"} for a in range(32)]
    found: dict[str, Any] = {}

    def changed() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        return model

    def run(output: str, resume: str | None = None, **more: Any) -> Any:
        args = arguments(
            f"{folder}/{output}", world_size, engine, kind=DPOConfig, save_strategy="steps", save_steps=8, bf16=False,
            max_length=32, **more,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # total_step
            trainer = DPOTrainer(
                model=changed(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                peft_config=adalora_of_peft(), callbacks=[AdaLoraCallback()],
            )  # fmt: skip
            assert trainer.ref_model is None  # no second model is loaded
            trainer.train(resume_from_checkpoint=resume)
        logs = [record for record in trainer.state.log_history if "loss" in record]
        found[output] = {
            "losses": {record["step"]: (record["loss"], record["rewards/margins"]) for record in logs},
            "budgets": [record["budget"] for record in logs],
            "adapters": adapters_of(trainer.adalora.hooks),
        }
        found["kind"] = type(trainer.ref_model).__name__
        return trainer

    trainer = run("whole")
    trainer.save_model(f"{folder}/adapter")
    run("resumed", f"{folder}/whole/checkpoint-16")
    if world_size == 1:  # TRL has each process look for what it computed in a temporary folder of its own
        run("precomputed", precompute_ref_log_probs=True)
    with without_adapters(trainer.model):
        found["reference"] = logits_of(trainer.model)
    found["logits"], found["first"] = logits_of(trainer.model), logits_of(changed())
    found["loaded"] = logits_of(peft.PeftModel.from_pretrained(changed(), f"{folder}/adapter"))
    return found


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), [("single", 1), ("ddp", 2)])
def test_peft_config_as_it_is_in_dpo_trainer(engine: str, world_size: int, tmp_path: Path) -> None:
    for found in run_ranks(world_size, by_dpo, str(tmp_path), engine, timeout=3 * HANG_SECONDS):
        whole = found["whole"]
        assert whole["budgets"][0] == 3 * NUM_MATRICES and whole["budgets"][-1] == 2 * NUM_MATRICES
        assert found["kind"] == "WithoutAdapters" and torch.equal(found["reference"], found["first"])
        assert abs(whole["losses"][1][0] - math.log(2)) < 1e-6 and whole["losses"][1][1] == 0  # the policy is its own
        assert whole["losses"][STEPS][1] != 0
        for other in ("resumed", "precomputed") if world_size == 1 else ("resumed",):
            assert found[other]["losses"] == whole["losses"]
            for name, delta in whole["adapters"].items():
                assert torch.equal(delta, found[other]["adapters"][name])
        torch.testing.assert_close(found["loaded"], found["logits"], rtol=0, atol=5e-5)


REWARDED = "aeiou"


def by_policy(rank: int, world_size: int, folder: str, kind: str, with_peft: bool) -> dict[str, Any]:
    """A few steps of GRPO or RLOO towards vowels, near to the reference."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    one_process()
    tokenizer, base = byte_tokenizer(), Path(folder, "base")
    tokenizer.save_pretrained(base)
    tiny_llama(len(tokenizer), hidden_size=16).save_pretrained(base)
    config_class, trainer_class = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    args = config_class(
        output_dir=f"{folder}/run", max_steps=12, per_device_train_batch_size=4, num_generations=4, beta=0.1,
        max_completion_length=8, learning_rate=2e-2, logging_steps=1, save_steps=6, report_to="none", use_cpu=True,
        disable_tqdm=True, bf16=False,
    )  # fmt: skip

    def reward(completions: list[str], **others: Any) -> list[float]:
        return [float(sum(letter in REWARDED for letter in completion)) for completion in completions]

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    first = logits_of(model)
    if with_peft:
        theirs = peft.AdaLoraConfig(
            init_r=3, target_r=2, tinit=2, tfinal=6, total_step=12, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        callback, more = AdaLoraCallback(), {"peft_config": theirs}
    else:
        config = AdaLoraConfig(init_rank=3, target_rank=2, initial_warmup_steps=2, final_steps=6)
        adapt(model, config)
        callback, more = AdaLoraCallback(config), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # total_step
        trainer = trainer_class(
            model=model, args=args, train_dataset=Dataset.from_list([{"prompt": f"{n} plus"} for n in range(16)]),
            reward_funcs=reward, processing_class=tokenizer, callbacks=[callback], **more,
        )  # fmt: skip
    trainer.train()
    trainer.save_model(f"{folder}/adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter")
    with without_adapters(trainer.model):
        reference = logits_of(trainer.model)
    logs = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "logits": logits_of(trainer.model), "loaded": logits_of(loaded), "first": first, "reference": reference,
        "ranks": sum(callback.hooks.rank_pattern().values()), "logs": logs, "kind": type(trainer.ref_model).__name__,
    }  # fmt: skip


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "with_peft"), [("grpo", False), ("grpo", True), ("rloo", True)])
def test_policies_stay_near_their_reference(kind: str, with_peft: bool, tmp_path: Path) -> None:
    [found] = run_ranks(1, by_policy, str(tmp_path), kind, with_peft)
    assert found["ranks"] == 2 * NUM_MATRICES and found["logs"][-1]["budget"] == 2 * NUM_MATRICES
    assert torch.equal(found["reference"], found["first"])
    assert (found["logits"] - found["first"]).abs().max() > 1e-3
    torch.testing.assert_close(found["loaded"], found["logits"], rtol=0, atol=5e-5)
    divergence = [record["kl"] for record in found["logs"]]
    assert abs(divergence[0]) < 1e-6 and divergence[-1] > 1e-6
    assert found["kind"] == ("WithoutAdapters" if with_peft else "LlamaForCausalLM")
