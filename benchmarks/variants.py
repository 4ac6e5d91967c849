"""The four ways to train a model's adapters that benchmarks compare: AdaLoRA and LoRA, ours and PEFT's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_dist.config.methods import method_config, settings_of
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.packing import pack_adapters

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = {"adalora": "our AdaLoRA", "lora": "our LoRA", "peft-adalora": "PEFT AdaLoRA", "peft-lora": "PEFT LoRA"}


def llama(hidden: int, mlp: int, num_layers: int, num_heads: int = 4, vocabulary: int = 32, **more: Any) -> nn.Module:
    """A LLaMA of these sizes with random weights, seven adaptable matrices per layer."""
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=num_layers, vocab_size=vocabulary
    )
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=num_heads, **shape, **more))


class Variant:
    """A model under one of the methods of ``NAMES``, and its training step.

    Args:
        model: plain; it is changed.
        rank, target: initial and final mean rank.
        schedule: total, t_i, t_f and the mask interval, in steps.
        fused: AdamW's own kernel.
        compacts: ours loses pruned triplets when the pattern freezes, as in the recipes.
        packs: ours has the adapters of a block in one parameter, as under FSDP2 and ZeRO-3.
        changes: to our configuration.
    """

    def __init__(
        self,
        method: str,
        model: nn.Module,
        rank: int,
        target: int,
        schedule: tuple[int, int, int, int],
        fused: bool = True,
        targets: tuple[str, ...] = TARGETS,
        compacts: bool = False,
        packs: bool = False,
        **changes: Any,
    ) -> None:
        self.compacts = compacts
        total, initial, final, interval = schedule
        self.hooks: Any = None  # ours
        self._peft_allocator: Any = None
        self._num_steps = 0
        if method.startswith("peft"):
            from peft import AdaLoraConfig, LoraConfig, get_peft_model

            common: dict[str, Any] = dict(lora_alpha=16, target_modules=list(targets))
            if method == "peft-lora":
                model = get_peft_model(model, LoraConfig(r=rank, **common))
            else:
                timing: dict[str, Any] = dict(
                    tinit=initial, tfinal=final, deltaT=interval, total_step=total, orth_reg_weight=0.1
                )
                model = get_peft_model(model, AdaLoraConfig(init_r=rank, target_r=target, **timing, **common))
                self._peft_allocator = model.base_model
        else:
            falling = dict(
                target_rank=target, initial_warmup_steps=initial, final_steps=final, mask_interval_steps=interval,
                orthogonality=0.1, **changes,
            )  # fmt: skip
            common = dict(init_rank=rank, alpha=16, targets=targets)
            config: Any = method_config(method, **common, **settings_of(method, falling))
            adapt(model, config)
            if packs:
                pack_adapters(model, config)
        self.model: Any = model
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, fused=fused)
        if not method.startswith("peft"):
            self.hooks = attach(model, self.optimizer, config, total)
            self.hooks.detach()  # not every benchmark runs to the end

    def forward_backward(self, batch: torch.Tensor | dict[str, torch.Tensor]) -> None:
        """``batch``: the model's arguments, or tokens that are inputs and labels in one."""
        if isinstance(batch, torch.Tensor):
            batch = {"input_ids": batch, "labels": batch}
        loss = self.model(**batch).loss
        if hasattr(self.model, "allreduce_gradients"):  # DeepSpeed's engine
            self.model.backward(loss)
        else:
            loss.backward()

    def update(self) -> None:
        """Optimizer step, and PEFT's call after it."""
        (self.model if hasattr(self.model, "allreduce_gradients") else self.optimizer).step()
        if self._peft_allocator is not None:
            self._peft_allocator.update_and_allocate(self._num_steps)
        if self.compacts:
            self.hooks.method_step.compact(self.hooks, self.model, self.optimizer)
        self._num_steps += 1

    def step(self, batch: torch.Tensor | dict[str, torch.Tensor]) -> None:
        self.forward_backward(batch)
        self.update()
        self.optimizer.zero_grad()
