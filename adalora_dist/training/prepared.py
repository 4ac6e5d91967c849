"""A model under its engine, with what trains it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from adalora_dist.artifacts.checkpoints.content import Checkpoint, held_parts, load_checkpoint
from adalora_dist.backbones.activations import checkpoint_activations
from adalora_dist.backbones.load import load_tokenizer
from adalora_dist.backbones.sharded_load import read_shards, read_trained_modules
from adalora_dist.config.engines import BACKBONE_SHARDING
from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.hooks import MethodHooks, attach
from adalora_dist.methods.packing import pack_adapters
from adalora_dist.methods.prefix_text import check_text
from adalora_dist.methods.protocol import adapters_of, trained_parameters
from adalora_dist.sharding.base import innermost
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.training.backbone_checks import check_backbone, refuse_own_layers
from adalora_dist.training.compiled import compile_blocks
from adalora_dist.training.engine import engine_name, fill_deepspeed_sizes, tied_weights_in_one_group
from adalora_dist.training.prefetch import prefetch_blocks
from adalora_dist.training.resume import compare_backbone, set_loss_scale


@dataclass
class Prepared:
    """A model under its engine, with what trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer  # as the engine wraps it
    inner_optimizer: torch.optim.Optimizer  # the torch optimizer that updates the weights
    hooks: MethodHooks  # of the method, on that optimizer
    parameters: dict[str, torch.Tensor]  # all that is trained, as the optimizer has it, by name
    resumed: Checkpoint | None = None  # where the run continues from


def total_steps(train: TrainConfig, plan: BatchPlan) -> int:
    """Optimizer steps of the run."""
    return train.max_steps or plan.num_steps(train.epochs)


def check_budget(plan: BatchPlan, train: TrainConfig) -> None:
    """Raise unless every row of ``plan`` is within ``micro_batch_tokens``, where it is set.

    Raises:
        UserError: the longest row is not.
    """
    longest = plan.longest
    if 0 < train.micro_batch_tokens < longest:
        raise UserError(
            f"micro_batch_tokens {train.micro_batch_tokens}: the longest row has {longest} tokens, and a row is in one "
            f"forward; set it to at least {longest}, to 0 (micro_batch_size counts), or cut rows shorter"
        )


def prepare(
    accelerator: Accelerator, model: nn.Module, config: RunConfig, num_steps: int, resumed: Checkpoint | None = None
) -> Prepared:
    """Optimizer over the trainable parameters, method attached, both handed to the engine; weights read last.

    Raises:
        UserError: ``resumed`` does not fit the model, a text to start from is too short, accelerate puts another
            optimizer in the place of the one that the method works on; as
            :func:`adalora_dist.training.backbone_checks.check_backbone`, and as
            :func:`adalora_dist.training.backbone_checks.refuse_own_layers`.
    """
    refuse_own_layers(model, engine_name(accelerator), accelerator.num_processes)
    for line in check_backbone(model, config):
        accelerator.print(line)
    method = method_for(config.adapter)
    tokens = _start_tokens(config)
    if resumed is not None:
        compare_backbone(resumed, config.model)
        adapters = adapters_of(model)
        method.shrink(adapters, held_parts(resumed, adapters))
    read_trained_modules(model)
    if config.train.pack_adapters and not config.train.compile and engine_name(accelerator) in BACKBONE_SHARDING:
        pack_adapters(model, config.adapter)
    optimizer = method.optimizer(model, config.train)
    hooks = attach(model, optimizer, config.adapter, num_steps)
    checkpoint_activations(model, config.train)
    fill_deepspeed_sizes(accelerator, model)
    with tied_weights_in_one_group(accelerator, model):
        model, wrapped = accelerator.prepare(model, optimizer)
    if (stepped := innermost(wrapped)) is not optimizer:
        raise UserError(
            f"{type(stepped).__name__} was put in the place of {type(optimizer).__name__}, which the method works on: "
            'with an offloaded optimizer set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration'
        )
    read_shards(model)
    prepared = Prepared(model, wrapped, optimizer, hooks, trained_parameters(model), resumed)
    if resumed is not None:
        load_checkpoint(resumed, prepared.parameters, wrapped, hooks)
        set_loss_scale(accelerator, wrapped, resumed.run["loss_scale"])
    elif tokens:
        hooks.start(model, wrapped, tokens)
    if config.train.fsdp_prefetch:
        prefetch_blocks(model, config.train.fsdp_prefetch)
    if config.train.compile:
        compile_blocks(model, hooks)
    return prepared


def _start_tokens(config: RunConfig) -> list[int]:
    """Of the text that a prefix starts from, as the model's tokenizer has it; none without a text."""
    if (text := config.adapter.start_text) is None:
        return []
    tokens: list[int] = load_tokenizer(config.model)(text)["input_ids"]
    check_text(tokens, config.adapter.num_positions)
    return tokens


def learning_rate(train: TrainConfig, step: int, num_steps: int) -> float:
    """Linear warm-up from 0, then linear or cosine decay to ``lr_end_ratio``, or constant.

    A pure function of the 0-based step.
    """
    num_warmup = train.lr_warmup_steps
    if num_warmup is None:
        num_warmup = math.ceil(train.lr_warmup_ratio * num_steps)
    if step < num_warmup:
        return train.learning_rate * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    end = train.lr_end_ratio
    if train.lr_schedule == "linear":
        return train.learning_rate * (end + (1 - end) * (1 - done))
    if train.lr_schedule == "cosine":
        return train.learning_rate * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done)))
    return train.learning_rate
