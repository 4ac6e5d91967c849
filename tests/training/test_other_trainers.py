"""Trainers of others: TRL's for preferences, transformers' for encoder-decoders; and what trackers get to see."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from adalora_dist import AdaLoraCallback, AdaLoraConfig, adapt
from adalora_dist.tasks.demo_models.pretrained import word_tokenizer
from tests.support.ranks import run_ranks
from tests.support.tiny_encoders import sentence_encoder
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama
from tests.support.tiny_text_project import tiny_bart
from tests.support.trainer_runs import adapters_of, arguments, one_process

pytestmark = pytest.mark.slow

STEPS = 12
SETTINGS = AdaLoraConfig(init_rank=3, target_rank=2, initial_warmup_steps=2, final_steps=6)
COMMON = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "logging_steps": 1,
    "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False,
}  # fmt: skip


class Tracker(TrainerCallback):
    """As those that ``report_to`` adds: it stands before the user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        self.logs.append(dict(logs))


def by_dpo(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    one_process()
    tokenizer, base = byte_tokenizer(), Path(folder, "base")
    tokenizer.save_pretrained(base)
    tiny_llama(len(tokenizer), hidden_size=16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapt(model, SETTINGS)
    rows = [{"prompt": f"{a}+1=", "chosen": f"{a + 1}", "rejected": f"{a + 2}"} for a in range(16)]
    callback, tracker = AdaLoraCallback(SETTINGS), Tracker()
    args = DPOConfig(output_dir=f"{folder}/run", save_steps=6, max_length=32, **COMMON)
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[tracker, callback],
    )  # fmt: skip
    trainer.train()
    callback.merge_and_save(f"{folder}/merged")
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        mine, merged = (m.eval()(ids).logits for m in (model, AutoModelForCausalLM.from_pretrained(f"{folder}/merged")))
    return {
        "ranks": sum(callback.hooks.rank_pattern().values()),
        "logs": tracker.logs,
        "difference": float((mine - merged).abs().max()),
        "tokenizer": Path(folder, "merged", "tokenizer.json").is_file(),
    }


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_preferences(tmp_path: Path) -> None:
    [result] = run_ranks(1, by_dpo, str(tmp_path))
    assert result["ranks"] == 2 * 14 and result["difference"] < 1e-5 and result["tokenizer"]
    logs = [record for record in result["logs"] if "loss" in record]
    assert [record["budget"] for record in logs][-1] == 28 and all("mean_rank" in record for record in logs)
    assert any("rewards/accuracies" in record for record in logs)


SENTENCES = ["a cat sits", "a dog runs", "one more word", "no more words", "the sun is up", "rain falls down"]


def by_sentence_transformers(rank: int, world_size: int, folder: str, engine: str) -> dict[str, Any]:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    if rank == 0:
        sentence_encoder(f"{folder}/encoder", SENTENCES)
    dist.barrier()
    rows = Dataset.from_list([{"anchor": a, "positive": b} for a in SENTENCES for b in SENTENCES if a != b])
    found: dict[str, Any] = {}

    def run(output: str, resume: str | None = None) -> Any:
        model = SentenceTransformer(f"{folder}/encoder", device="cpu")
        adapt(model[0].model, SETTINGS)
        args = arguments(
            f"{folder}/{output}", world_size, engine, kind=SentenceTransformerTrainingArguments, max_steps=STEPS,
            save_strategy="steps", save_steps=5,
        )  # fmt: skip
        callback = AdaLoraCallback(SETTINGS)
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=rows, loss=MultipleNegativesRankingLoss(model), callbacks=[callback]
        )
        trainer.train(resume_from_checkpoint=resume)
        found[output] = adapters_of(callback.hooks)
        found["ranks"] = sum(callback.hooks.rank_pattern().values()) / len(callback.hooks.rank_pattern())
        return trainer

    trainer = run("whole")
    trainer.save_model(f"{folder}/saved")
    found["vectors"] = torch.tensor(trainer.model.encode(SENTENCES, show_progress_bar=False))
    run("resumed", f"{folder}/whole/checkpoint-5")
    return found


def embedded(rank: int, world_size: int, folder: str) -> list[torch.Tensor]:
    from sentence_transformers import SentenceTransformer

    return [
        torch.tensor(SentenceTransformer(f"{folder}/{name}", device="cpu").encode(SENTENCES, show_progress_bar=False))
        for name in ("encoder", "saved", f"whole/checkpoint-{STEPS}")
    ]


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is absent")
@pytest.mark.parametrize(("engine", "world_size"), [("single", 1), ("ddp", 2)])
def test_encoders_of_sentences(engine: str, world_size: int, tmp_path: Path) -> None:
    for found in run_ranks(world_size, by_sentence_transformers, str(tmp_path), engine):
        assert found["ranks"] == 2
        for name, delta in found["whole"].items():
            assert torch.equal(delta, found["resumed"][name])
    [[untrained, *loaded]] = run_ranks(1, embedded, str(tmp_path))
    assert (untrained - found["vectors"]).abs().max() > 1e-2
    for vectors in loaded:
        torch.testing.assert_close(vectors, found["vectors"], rtol=0, atol=5e-5)


def by_seq2seq(rank: int, world_size: int, folder: str, eval_delay: int) -> dict[str, Any]:
    one_process()
    words = [f"w{n}" for n in range(20)]
    tokenizer = word_tokenizer([" ".join(words)])
    model = tiny_bart(len(tokenizer))
    model.accepts_loss_kwargs = False
    model.save_pretrained(f"{folder}/base")
    model.name_or_path = f"{folder}/base"
    adapt(model, SETTINGS)
    rows = [dict(tokenizer(f"{words[n]} {words[n + 1]}"), labels=tokenizer(words[n])["input_ids"]) for n in range(16)]
    callback = AdaLoraCallback(SETTINGS)
    args = Seq2SeqTrainingArguments(
        output_dir=f"{folder}/run{eval_delay}", predict_with_generate=True, generation_max_length=8,
        eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, load_best_model_at_end=True,
        metric_for_best_model="loss", eval_delay=eval_delay, **COMMON,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], callbacks=[callback],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
    )  # fmt: skip
    trainer.train()
    predicted = trainer.predict(rows[:4]).predictions
    return {
        "ranks": sum(callback.hooks.rank_pattern().values()),
        "matrices": len(callback.hooks.rank_pattern()),
        "best": trainer.state.best_global_step,
        "shape": predicted.shape,
    }


@pytest.mark.parametrize("eval_delay", [0, 8])
def test_encoder_decoders_with_generation(tmp_path: Path, eval_delay: int) -> None:
    [result] = run_ranks(1, by_seq2seq, str(tmp_path), eval_delay)
    assert result["ranks"] == 2 * result["matrices"] and result["best"] in (9, 12) and result["shape"][0] == 4
