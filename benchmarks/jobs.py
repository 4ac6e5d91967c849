"""The same fine-tuning job by this project, PEFT with HF Trainer, TRL and torchtune, each in its own process. On CPU.

    python benchmarks/jobs.py                      prints the table; a few minutes, medians of three interleaved rounds
    python benchmarks/jobs.py --torchtune PYTHON   with the interpreter of another environment for torchtune

torchtune wants an older torchao than others do: ``pip install torchtune==0.6.1 torchao==0.15.0`` in an environment of
its own that has torch and this project, too. Where it is not installed, its row is left out, and the script says so.

A LoRA of rank 8 on all linear maps of a small LLaMA, dropout 0.05, 40 steps of 8 rows of unequal lengths, loss on the
second half of each. Seconds are of the process's CPU time, on one thread: wall time would measure the neighbours.
"""

from __future__ import annotations

import argparse
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
JOBS = {"ours": "ours", "peft": "PEFT + Trainer", "trl": "TRL SFTTrainer", "torchtune": "torchtune"}
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
    """CPU seconds of this process at the ends of its steps, from its start on, and its peak memory up to the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.peak = 0

    def step(self, *_: Any) -> None:
        self.ends.append(time.process_time())
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def report(self, model: Any, loss: float, forward: Callable[[Any], Any] | None = None) -> None:
        """Print what the job took; the first step is start-up, the others are the pace.

        Args:
            forward: from token ids to logits, by default as models of transformers do.
        """
        import torch

        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests.support.kept import kept_bytes

        tokens = sum(len(row["input_ids"]) for row in rows()[BATCH:])
        ids = torch.arange(3, 1027).view(8, 128)
        model.train()
        logits = forward or (lambda ids: model(input_ids=ids).logits)
        kept = kept_bytes(lambda: logits(ids), tuple(model.parameters()))
        pace = tokens / (self.ends[-1] - self.ends[0])
        print("\n" + json.dumps([pace, self.peak / 1e3, self.ends[0], kept / 1e6, loss]))


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


def torchtune_rows(_: Any) -> list[Any]:
    return [{"tokens": row["input_ids"], "labels": row["labels"]} for row in rows()]


class TorchtunePadding:
    """Of a tokenizer, what torchtune's recipe asks for when rows are tokens already."""

    pad_id = 0


def torchtune(folder: str) -> None:
    """Its own recipe for one device, with the configuration shipped for LLaMA-2, at the sizes of this job."""
    import runpy

    import torchtune
    from omegaconf import OmegaConf

    recipes = Path(torchtune.__file__).parents[1] / "recipes"
    config = json.loads(Path(folder, "config.json").read_text())
    output = f"{Path(folder).parent}/torchtune"  # inside the model's folder it is refused
    shape = {
        "vocab_size": config["vocab_size"], "num_layers": config["num_hidden_layers"], "max_seq_len": 512,
        "num_heads": config["num_attention_heads"], "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"], "intermediate_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
    }  # fmt: skip
    adapter = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
               "lora_rank": RANK, "lora_alpha": 16, "lora_dropout": DROPOUT}  # fmt: skip
    settings = OmegaConf.merge(OmegaConf.load(recipes / "configs/llama2/7B_lora_single_device.yaml"), {
        "output_dir": output, "device": "cpu", "dtype": "fp32", "seed": 0, "enable_activation_checkpointing": False,
        "batch_size": BATCH, "max_steps_per_epoch": STEPS, "gradient_accumulation_steps": 1, "clip_grad_norm": 1.0,
        "optimizer": {"lr": RATE}, "lr_scheduler": {"num_warmup_steps": 2}, "save_adapter_weights_only": True,
        "checkpointer": {"checkpoint_dir": folder, "checkpoint_files": ["model.safetensors"]},
    })  # fmt: skip
    settings.model = {"_component_": "torchtune.models.llama2.lora_llama2", **shape, **adapter}
    settings.tokenizer = {"_component_": f"{Path(__file__).stem}.{TorchtunePadding.__name__}"}
    settings.dataset = {"_component_": f"{Path(__file__).stem}.{torchtune_rows.__name__}"}

    clock, losses = Clock(), []
    recipe: Any = runpy.run_path(str(recipes / "lora_finetune_single_device.py"))["LoRAFinetuneRecipeSingleDevice"]
    job = recipe(settings)
    job.setup(settings)
    job._optimizer.register_step_post_hook(clock.step)
    job._metric_logger.log_dict = lambda payload, step: losses.append(float(payload["loss"]))
    job.train()
    job._model.set_num_output_chunks(1)
    clock.report(job._model, losses[-1], job._model)


def write_model(folder: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from variants import llama

    from tests.support.tiny_language_model import byte_tokenizer

    model: Any = llama(256, 688, 4, vocabulary=4000, max_position_embeddings=512, pad_token_id=0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def has_torchtune(python: str) -> bool:
    return not subprocess.run([python, "-c", "import torchtune"], capture_output=True).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchtune", metavar="PYTHON", default=sys.executable, help="interpreter that has torchtune")
    asked = parser.parse_args()
    pythons = dict.fromkeys(JOBS, sys.executable) | {"torchtune": asked.torchtune}
    if not has_torchtune(asked.torchtune):
        print(f"torchtune is left out: {asked.torchtune} cannot import it; how to install it is said in --help")
        del pythons["torchtune"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, list[list[float]]] = {name: [] for name in pythons}
    for _ in range(ROUNDS):
        for name, python in pythons.items():
            with tempfile.TemporaryDirectory() as whole:
                folder = f"{whole}/model"
                write_model(folder)
                done = subprocess.run([python, __file__, name, folder], env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    print("| job | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for name, values in found.items():
        medians = [statistics.median(column) for column in zip(*values, strict=True)]
        shown = (f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in medians)
        print(f"| {JOBS[name]} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in JOBS:
        {"ours": ours, "peft": peft, "trl": trl, "torchtune": torchtune}[sys.argv[1]](sys.argv[2])
    else:
        main()
