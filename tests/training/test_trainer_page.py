"""docs/trainer.md runs as printed, and TRL's SFTTrainer takes what PEFT's configuration says."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from adalora_dist import AdaLoraCallback, AdaLoraConfig, adapt
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama
from tests.support.trainer_runs import one_process

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8"), re.DOTALL)
IDS = torch.arange(3, 11).view(1, 8)
NUM_MATRICES = 14


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.clone()


def run_page(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    one_process()
    os.chdir(folder)
    tiny_llama(31, hidden_size=16).save_pretrained("base")
    rows = [{"input_ids": [3 + k % 5] * 6, "labels": [3 + k % 5] * 6} for k in range(16)]
    names: dict[str, Any] = {"base": "base", "rows": rows}
    found: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/trainer.md", "exec"), names)
        found.setdefault("trained", logits_of(names["model"]))
        if "loaded" in names:
            found.setdefault("loaded", logits_of(names["loaded"]))
        if "resume_from_checkpoint" in block:
            found["resumed"] = logits_of(names["model"])
    found["merged"] = logits_of(AutoModelForCausalLM.from_pretrained("merged"))
    found["ranks of PEFT's"] = sum(names["trainer"].adalora.hooks.rank_pattern().values())
    return found


def test_the_page_runs_as_printed(tmp_path: Path) -> None:
    assert len(BLOCKS) == 5
    [result] = run_ranks(1, run_page, str(tmp_path))
    assert torch.equal(result["resumed"], result["trained"])
    for way in ("loaded", "merged"):
        torch.testing.assert_close(result[way], result["trained"], rtol=0, atol=5e-5)
    assert result["ranks of PEFT's"] == 4 * NUM_MATRICES


def by_sft_trainer(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Trained, resumed and saved, from PEFT's own configuration."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    one_process()
    tokenizer, base = byte_tokenizer(), Path(folder, "base")
    tiny_llama(len(tokenizer), hidden_size=16).save_pretrained(base)
    text = Dataset.from_list([{"text": f"{a} plus {b} is {a + b}"} for a in range(8) for b in range(4)])
    theirs = peft.AdaLoraConfig(
        init_r=3, target_r=2, tinit=3, tfinal=6, total_step=20, target_modules="all-linear", task_type="CAUSAL_LM"
    )  # fmt: skip

    def run(output: str, resume: str | None = None, **options: Any) -> Any:
        args = SFTConfig(
            output_dir=f"{folder}/{output}", max_steps=20, per_device_train_batch_size=8, learning_rate=5e-2,
            logging_steps=1, save_steps=8, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # total_step
            config = AdaLoraConfig.from_peft(theirs)
        adapt(model, config)
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=text, processing_class=tokenizer,
            callbacks=[AdaLoraCallback(config)], **options,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    resumed = run("resumed", f"{folder}/whole/checkpoint-8")
    whole.save_model(f"{folder}/adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter")
    try:
        run("wrong", peft_config=peft.LoraConfig(target_modules=["embed_tokens"]))
        error = ""
    except ValueError as refused:
        error = str(refused)
    return {
        "logits": [logits_of(model) for model in (whole.model, resumed.model, loaded)],
        "budget": sum(whole.adalora.hooks.rank_pattern().values()),
        "error": error,
    }


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_sft_trainer_with_what_peft_was_told(tmp_path: Path) -> None:
    [result] = run_ranks(1, by_sft_trainer, str(tmp_path))
    whole, resumed, loaded = result["logits"]
    assert torch.equal(whole, resumed)
    torch.testing.assert_close(loaded, whole, rtol=0, atol=5e-5)
    assert result["budget"] == 2 * NUM_MATRICES
    assert "leave peft_config out" in result["error"]
