"""The same fine-tuning job by this project, by PEFT with HF Trainer, and by TRL, each in a process of its own. On CPU.

    python benchmarks/jobs.py             prints the table; a few minutes, medians of three interleaved rounds

A LoRA of rank 8 on all linear maps of a small LLaMA, dropout 0.05, 40 steps of 8 rows of unequal lengths, loss on the
second half of each. Seconds are of the process's CPU time, on one thread: wall time would measure the neighbours.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, BATCH, RANK, DROPOUT, RATE = 40, 8, 8, 0.05, 5e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
JOBS = {"ours": "ours", "peft": "PEFT + Trainer", "trl": "TRL SFTTrainer"}
ROUNDS = 3
COLUMNS = ("tokens per CPU s", "peak RSS, MB", "start to first step, CPU s", "kept for backward, MB", "last loss")


def rows() -> list[Any]:
    """As many as the job reads, once each: 48 to 200 tokens."""
    import random

    draws = random.Random(0)
    made = []
    for _ in range(STEPS * BATCH):
        ids = [draws.randrange(3, 4000) for _ in range(draws.randrange(48, 200))]
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return made


class Clock:
    """CPU seconds of this process at the ends of its steps, from its start on."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, *_: Any) -> None:
        self.ends.append(time.process_time())

    def report(self, model: Any, loss: float) -> None:
        """Print what the job took; the first step is start-up, the others are the pace."""
        import torch

        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests.support.kept import kept_bytes

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        tokens = sum(len(row["input_ids"]) for row in rows()[BATCH:])
        ids = torch.arange(3, 1027).view(8, 128)
        model.train()
        kept = kept_bytes(lambda: model(input_ids=ids).logits, tuple(model.parameters()))
        pace = tokens / (self.ends[-1] - self.ends[0])
        print("\n" + json.dumps([pace, peak, self.ends[0], kept / 1e6, loss]))


def ours(folder: str) -> None:
    from transformers import AutoModelForCausalLM

    from adalora_dist.config.methods import method_config
    from adalora_dist.config.sections import RunConfig, TrainConfig
    from adalora_dist.methods.inject import adapt
    from adalora_dist.tasks.batches import BatchPlan
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.training.engine import build_accelerator
    from adalora_dist.training.loop import train
    from adalora_dist.training.prepared import prepare
    from adalora_dist.training.run_folder import RunFolder

    clock, data = Clock(), rows()
    settings = RunConfig(
        adapter=method_config("lora", init_rank=RANK, alpha=16, dropout=DROPOUT, targets=TARGETS),
        train=TrainConfig(output_dir=f"{folder}/ours", max_steps=STEPS, batch_size=BATCH, micro_batch_size=BATCH,
                          learning_rate=RATE, checkpoint_every=0),
    )  # fmt: skip
    accelerator = build_accelerator(settings.train)
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapt(model, settings.adapter, 0)
    prepared = prepare(accelerator, model, settings, STEPS)
    prepared.inner_optimizer.register_step_post_hook(clock.step)
    plan = BatchPlan.of_rows(data, BATCH, 0)
    report = RunFolder(settings, True, {})
    losses = train(
        accelerator, prepared, plan, causal_loss(data, 0, accelerator.device), settings, report, lambda _: None
    )
    clock.report(model, losses[-1])


def _hf_arguments(kind: Any, folder: str, name: str) -> Any:
    return kind(
        output_dir=f"{folder}/{name}", max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE,
        use_cpu=True, bf16=False, save_strategy="no", report_to=[], logging_steps=1, warmup_steps=2, disable_tqdm=True,
        gradient_checkpointing=False,  # which TRL has by default
    )  # fmt: skip


def _with_trainer(folder: str, name: str, make: Callable[[Any, Any], Any]) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(folder)
    shape: dict[str, Any] = dict(r=RANK, lora_alpha=16, lora_dropout=DROPOUT, target_modules=list(TARGETS))
    config = LoraConfig(**shape, task_type="CAUSAL_LM")
    trainer = make(model, (config, Dataset.from_list(rows())))
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(clock.step)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    clock.report(trainer.model, losses[-1])


def peft(folder: str) -> None:
    def make(model: Any, given: Any) -> Any:
        from peft import get_peft_model
        from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

        config, data = given
        return Trainer(
            get_peft_model(model, config), _hf_arguments(TrainingArguments, folder, "peft"), train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder)),
        )  # fmt: skip

    _with_trainer(folder, "peft", make)


def trl(folder: str) -> None:
    def make(model: Any, given: Any) -> Any:
        from transformers import AutoTokenizer
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        config, data = given
        arguments = _hf_arguments(SFTConfig, folder, "trl")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return SFTTrainer(model, arguments, train_dataset=data, peft_config=config, processing_class=tokenizer)

    _with_trainer(folder, "trl", make)


def write_model(folder: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from variants import llama

    from tests.support.tiny_language_model import byte_tokenizer

    model: Any = llama(256, 688, 4, vocabulary=4000, max_position_embeddings=512, pad_token_id=0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def main() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, list[list[float]]] = {name: [] for name in JOBS}
    for _ in range(ROUNDS):
        for name in JOBS:
            with tempfile.TemporaryDirectory() as folder:
                write_model(folder)
                command = [sys.executable, __file__, name, folder]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    print("| job | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for name, label in JOBS.items():
        values = [statistics.median(column) for column in zip(*found[name], strict=True)]
        shown = (f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in values)
        print(f"| {label} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        {"ours": ours, "peft": peft, "trl": trl}[sys.argv[1]](sys.argv[2])
    else:
        main()
