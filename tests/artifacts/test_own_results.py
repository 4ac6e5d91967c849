"""What the verbs of docs/api.md write of a loop of one's own: all of the model that was trained, however they are
called; and of a model in memory that its files do not make, nothing."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    Trainer,
    TrainingArguments,
)

from adalora_dist import (
    AdaLoraCallback,
    AdaLoraConfig,
    adapt,
    attach,
    load_adapter,
    merge,
    method_config,
    parameter_groups,
    save_adalora,
    save_adapter,
    save_lora,
)
from adalora_dist.artifacts.commands import FinishedRun
from tests.support.refusals import refused
from tests.support.tiny_language_model import tiny_gpt2, tiny_llama

STEPS = 6
LABELS = {0: "late", 1: "lost", 2: "found"}
BATCH: dict[str, Any] = {"input_ids": torch.arange(3, 15).view(2, 6), "labels": torch.tensor([0, 2])}
IDS = {"input_ids": BATCH["input_ids"]}
TEXT = {**IDS, "labels": IDS["input_ids"]}
ADALORA = AdaLoraConfig(init_rank=3, target_rank=2, final_steps=2, train_modules=("task-head",))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model: as a classifier it has neither head nor pooler in its files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("own") / "encoder"
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def classifier(base: Path, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    names = {"id2label": LABELS, "label2id": {label: number for number, label in LABELS.items()}}
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, **names)


def trained(model: Any, config: Any, batch: dict[str, Any] = BATCH) -> Any:
    """The hooks of a loop over one batch."""
    adapt(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, config, 5e-2), lr=5e-2)
    hooks = attach(model, optimizer, config, STEPS)
    for _ in range(STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.replace(model, optimizer)
    hooks.finish()
    return hooks


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**IDS).logits


def test_a_new_head_goes_with_every_form(encoder: Path, tmp_path: Path) -> None:
    model = classifier(encoder)
    updates = trained(model, ADALORA).updates()
    expected = logits(model)
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= updates.trained.keys()
    merge(updates, str(encoder), str(tmp_path / "merged"), show_progress=False)
    save_lora(updates, str(tmp_path / "lora"))
    save_adalora(updates, tmp_path / "adalora")
    save_adapter(updates, str(tmp_path / "adapter"))
    found = {
        "merged": AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"),
        "lora": AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "lora", num_labels=3),
        "adalora": PeftModel.from_pretrained(classifier(encoder, seed=7), tmp_path / "adalora"),
        "adapter": classifier(encoder, seed=8),
    }
    load_adapter(found["adapter"], str(tmp_path / "adapter"))
    for form, loaded in found.items():
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=5e-5, msg=lambda said, f=form: f"{f}: {said}")
    assert AutoConfig.from_pretrained(tmp_path / "merged").id2label == LABELS
    other = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    with refused("trained in full, is 3 there, and 2 in this model: load BertForSequenceClassification with num_label"):
        load_adapter(other, tmp_path / "adapter")
    again = pickle.loads(pickle.dumps(updates))
    assert again.trained.keys() == updates.trained.keys() and len(again) == len(updates) and again.model is None


@pytest.mark.parametrize("method", ["vera", "dylora", "relora", "dora", "hydra"])
def test_methods_are_lora_where_they_can_be(method: str, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    hooks = trained(model, method_config(method, init_rank=2), TEXT)
    if method in ("dora", "hydra"):
        with refused(f"what {method} leaves is no plain LoRA"):
            save_lora(hooks.updates(), tmp_path / "lora")
        with refused(f"what method {method} leaves is no plain LoRA"):
            model.save_pretrained(tmp_path / "saved")
        return
    save_lora(hooks.updates(), tmp_path / "lora")
    model.save_pretrained(tmp_path / "saved")
    for folder in ("lora", "saved"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=5e-5)


def trainer_of(model: Any, config: Any, folder: Path, **changes: Any) -> Trainer:
    rows = [{"input_ids": BATCH["input_ids"][0], "labels": BATCH["input_ids"][0]}] * 4
    args = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=2, learning_rate=5e-2, report_to="none", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=2, **changes,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=[AdaLoraCallback(config)])


def test_trainer_saves_what_relora_has_merged(tmp_path: Path) -> None:
    tiny_llama(40).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapt(model, config := method_config("relora", init_rank=2, restart_every_steps=2, restart_warmup_steps=1))
    trainer_of(model, config, tmp_path / "out").train()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "out" / f"checkpoint-{STEPS}")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=5e-5)
    with refused("no finished run .*checkpoint-6 is an adapter that PEFT loads, as Trainer writes it"):
        FinishedRun.read(tmp_path / "out")


def test_trainer_refuses_what_it_could_not_save_before_the_first_step(encoder: Path, tmp_path: Path) -> None:
    tiny_llama(40).save_pretrained(tmp_path / "base")
    longer = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    longer.resize_token_embeddings(44)
    without_head = ADALORA.model_copy(update={"train_modules": ()})
    other_head = classifier(encoder)
    other_head.classifier = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 3))
    cases = [
        (other_head, ADALORA, "classifier.0.* is trained, and BertForSequenceClassification as config.json makes it"),
        (longer, without_head, r"embed_tokens.weight has another size in the model than in its files \(40 x 32\)"),
        (classifier(encoder), without_head, r"lack 4 frozen parameters \(bert.pooler.*add their modules to train_modu"),
        (AutoModelForCausalLM.from_pretrained(tmp_path / "base"), method_config("dora"), "method dora leaves is no pl"),
    ]
    for model, config, reason in cases:
        adapt(model, config)
        with refused(reason):
            trainer_of(model, config, tmp_path / "out").train()
        with refused(reason):
            model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("checkpoint-*"))


def test_embeddings_that_are_tied_can_be_trained(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    updates = trained(model, AdaLoraConfig(init_rank=2, target_rank=1, train_modules=("wte",)), TEXT).updates()
    merge(updates, tmp_path / "base", tmp_path / "merged", show_progress=False)
    model.save_pretrained(tmp_path / "lora")
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora"),
    ):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=5e-5)


def test_values_that_are_not_the_files_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llama(40).save_pretrained(tmp_path / "base")
    config = AdaLoraConfig(init_rank=2, target_rank=1)
    with caplog.at_level(logging.WARNING, logger="adalora_dist"):
        for dtype in (torch.float32, torch.bfloat16):
            adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).float(), config)
        adapt(tiny_llama(40), config)
        assert not caplog.records
        changed = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            changed.model.layers[1].mlp.up_proj.weight.mul_(1.1)
        adapt(changed, config)
        assert "model.layers.1.mlp.up_proj.weight has other values than its files" in caplog.text
        adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base", num_hidden_layers=1, use_cache=False), config)
    assert "loaded with num_hidden_layers=1, and config.json" in caplog.text and "use_cache" not in caplog.text


def test_a_head_in_half_precision_is_said(encoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for dtype, is_said in ((torch.float32, False), (torch.bfloat16, True)):
        adapt(AutoModelForSequenceClassification.from_pretrained(encoder, dtype=dtype), ADALORA)
        assert ("is trained in bfloat16, in which steps of less than 0.004 of a weight" in caplog.text) == is_said


def test_folders_that_are_none_are_named(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    updates = trained(model, AdaLoraConfig(init_rank=2, target_rank=1), TEXT).updates()
    with refused("neither a folder that exists nor a name on the Hub"):
        merge(updates, tmp_path / "nowhere" / "base", tmp_path / "merged")
    with refused("base of this adapter is not known"):
        save_adapter(list(updates), tmp_path / "adapter")
