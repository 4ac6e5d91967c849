"""One small causal language model trained by ``Trainer`` and by the project's own loop, on the same global batches.

Functions for ``run_ranks``; each returns what one rank saw.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.methods.hooks import MethodHooks
from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.batches import BatchPlan, collate
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.tasks.rows.tokens import IGNORED, EncodedRow
from adalora_dist.training import trainer_callback
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.loop import train
from adalora_dist.training.prepared import prepare
from adalora_dist.training.run_folder import RunFolder
from adalora_dist.training.trainer_callback import AdaLoraCallback
from tests.support.paths import DS_CONFIGS
from tests.support.ranks import import_deepspeed
from tests.support.tiny_language_model import tiny_llama

deepspeed = import_deepspeed()

STEPS, GLOBAL_BATCH, VOCABULARY = 20, 8, 31
LEARNING_RATE, WEIGHT_DECAY, CLIP = 2e-2, 0.01, 0.5
SETTINGS = AdaLoraConfig(
    init_rank=3, target_rank=1.5, alpha=6, start="paper", init="orthonormal", initial_warmup_steps=3, final_steps=6,
    mask_interval_steps=2,
)  # fmt: skip


def model_with_adapters(settings: AdaLoraConfig = SETTINGS) -> LlamaForCausalLM:
    model = tiny_llama(VOCABULARY, hidden_size=16)
    adapt(model, settings, seed=1)
    return model


def example_rows(num_rows: int = 4 * GLOBAL_BATCH) -> list[EncodedRow]:
    """Sequences x -> 3x + 1 of 5 to 11 tokens, the first of them no targets: batches differ in target tokens."""
    rows: list[EncodedRow] = []
    for k in range(num_rows):
        ids = [3 + k % 25]
        for _ in range(4 + k * 5 % 7):
            ids.append(3 + (3 * ids[-1] + 1) % (VOCABULARY - 3))
        num_hidden = 1 + k % 3
        rows.append({"input_ids": ids, "labels": [IGNORED] * num_hidden + ids[num_hidden:]})
    return rows


def global_batches() -> tuple[list[EncodedRow], BatchPlan]:
    rows = example_rows()
    return rows, BatchPlan.of_rows(rows, GLOBAL_BATCH, seed=3, group_by_length=False)


def one_process() -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
        os.environ.pop(name, None)


def arguments(
    folder: str,
    world_size: int,
    engine: str = "single",
    accumulation: int = 1,
    kind: type[TrainingArguments] = TrainingArguments,
    **changes: Any,
) -> Any:
    """For ``engine``: single, ddp, fsdp2, or the name of a file in ds_configs.

    Rows come in sequential order, from a data set that lists those of all global batches, one after the other.
    """
    values = dict(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH // world_size // accumulation,
        gradient_accumulation_steps=accumulation, learning_rate=LEARNING_RATE, lr_scheduler_type="linear",
        weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP, train_sampling_strategy="sequential", logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    if engine == "single":  # Trainer takes a launcher's variables for a distributed run, of one process if need be
        one_process()
    elif engine == "fsdp2":
        values |= {"fsdp": True, "fsdp_config": {}}
    elif engine.startswith("zero"):
        deepspeed.init_distributed("gloo")  # with use_cpu, accelerate leaves this to deepspeed.initialize
        values |= {"deepspeed": str(DS_CONFIGS / f"{engine}.json")}
    args = kind(**{**values, **changes})
    assert args.world_size == world_size
    if engine == "fsdp2":
        # On CPU accelerate would run DDP instead: it turns only the types of accelerators into FSDP.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def trainer_of(
    model: Any, args: TrainingArguments, *callbacks: TrainerCallback, trainer_class: type[Trainer] = Trainer,
    **kwargs: Any,
) -> Trainer:  # fmt: skip
    rows, plan = global_batches()
    ordered = [rows[index] for step in range(STEPS) for index in plan.batch(step)]
    return trainer_class(
        model=model, args=args, train_dataset=ordered, data_collator=lambda batch: collate(batch, 0),
        callbacks=list(callbacks), **kwargs,
    )  # fmt: skip


def patterns_of(hooks: MethodHooks) -> dict[int, list[bool]]:
    return {a.step: a.keep.tolist() for a in hooks.method_step.allocations}


def adapters_of(hooks: MethodHooks) -> dict[str, torch.Tensor]:
    """By name, what each adapter adds to its matrix."""
    return {a.name: a.delta() for a in hooks.updates()}


def folder_of_rank_0(folder: str) -> str:
    shared = [folder]
    dist.broadcast_object_list(shared)
    return shared[0]


@contextmanager
def logged() -> Iterator[list[str]]:
    """The lines that the callback says while this lasts."""
    logger, lines = logging.getLogger(trainer_callback.__name__), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def by_trainer(rank: int, world_size: int, engine: str, accumulation: int = 1, *options: str) -> dict[str, Any]:
    """A run of ``Trainer``."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {"fsdp_config": {"activation_checkpointing": True}} if "checkpointing" in options else {}
        args = arguments(folder, world_size, engine, accumulation, **changes)
        if "zero_init" in options:  # as users load large models: partitioned from the first moment
            backbone = folder_of_rank_0(folder)
            tiny_llama(VOCABULARY, hidden_size=16).save_pretrained(backbone)  # writes on rank 0 alone
            dist.barrier()
            model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
            assert all(p.numel() == 0 for p in model.parameters())
            adapt(model, SETTINGS, seed=1)
        else:
            model = model_with_adapters()
        callback = AdaLoraCallback(SETTINGS)
        trainer = trainer_of(model, args, callback)
        with logged() as said:
            trainer.train()
        dist.barrier()  # before rank 0 removes what others may still read
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "losses": [entry["loss"] for entry in logs],
            "budgets": [entry["budget"] for entry in logs],
            "mean_ranks": [entry["mean_rank"] for entry in logs],
            "patterns": patterns_of(callback.hooks),
            "adapters": adapters_of(callback.hooks),
            "said": said,
            "num_processes": trainer.accelerator.num_processes,
            "wrapped": [base.__name__ for base in type(trainer.model_wrapped).__mro__],
        }


def by_own_loop(rank: int, world_size: int, accumulation: int) -> dict[str, Any]:
    """The recipes' loop on one process."""
    rows, plan = global_batches()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainConfig(
            output_dir=folder, max_steps=STEPS, batch_size=GLOBAL_BATCH, micro_batch_size=GLOBAL_BATCH // accumulation,
            learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, lr_schedule="linear", lr_warmup_ratio=0,
            max_grad_norm=CLIP,
        )  # fmt: skip
        config = RunConfig(adapter=SETTINGS, train=settings)
        accelerator = build_accelerator(settings)
        prepared = prepare(accelerator, model_with_adapters(), config, STEPS)
        loss_sum = causal_loss(rows, 0, accelerator.device)
        lines: list[str] = []
        losses = train(accelerator, prepared, plan, loss_sum, config, RunFolder(config, True, {}), lines.append)
        assert prepared.hooks.method_step is not None
        return {
            "losses": losses,
            "patterns": patterns_of(prepared.hooks),
            "adapters": adapters_of(prepared.hooks),
            "said": [line for line in lines if "pruning begins" in line],
        }
