"""What ``Trainer(deepspeed=FILE)`` may ask for where ranks are allocated: refused before an engine is built."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from adalora_dist.config.methods import LowRankConfig
from adalora_dist.io.errors import UserError, printable
from adalora_dist.training.deepspeed_settings import check_in_any_loop

_OWN = ("adam", "adamw", "lamb", "lion", "muon", "muadam", "muadamw", "musgd")
"""Optimizers that DeepSpeed makes in kernels of its own, where it is not told ``torch_adam``."""


def check_deepspeed(trainer: Trainer, config: LowRankConfig) -> None:
    """
    Raises:
        UserError: DeepSpeed's configuration makes ranks wrong, or puts an optimizer in the place of the Trainer's whose
            state can be neither continued nor reduced, where it has to be.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    settings: dict[str, Any] = plugin.deepspeed_config
    check_in_any_loop(settings)
    args = trainer.args
    saves = SaveStrategy(args.save_strategy) != SaveStrategy.NO and not args.save_only_model
    if not (saves or getattr(config, "compact", False)):
        return
    if (section := settings.get("optimizer")) is not None:
        name, params = str(section.get("type")), section.get("params") or {}
        if not params.get("torch_adam") and (name.lower() in _OWN or not hasattr(torch.optim, name)):
            raise UserError(
                f"DeepSpeed configuration: optimizer {printable(name, 60)}: DeepSpeed's own, and its state can neither "
                "be continued nor shrink; remove the section (Trainer makes AdamW), or, for Adam and AdamW, write "
                '"torch_adam": true in its params'
            )
    elif settings.get("zero_force_ds_cpu_optimizer", True) and _offloads(settings):
        raise UserError(
            "DeepSpeed configuration: zero_optimization.offload_optimizer: accelerate would put DeepSpeed's own Adam "
            "in the place of Trainer's, and its state can neither be continued nor shrink; write "
            '"zero_force_ds_cpu_optimizer": false, outside of all sections'
        )


def _offloads(settings: dict[str, Any]) -> bool:
    offload = (settings.get("zero_optimization") or {}).get("offload_optimizer") or {}
    return offload.get("device", "none") not in ("none", "auto")
