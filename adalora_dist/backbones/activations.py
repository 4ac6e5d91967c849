"""Gradient checkpointing: what blocks keep of a forward, what they compute again in backward, and where it lies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from adalora_dist.config.activations import ActivationsConfig
from adalora_dist.io.errors import UserError

_ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
"""Kernels of sdpa, as torch's dispatcher names them. The product of a matrix with an adapter is not kept: the branch is
added to it in place."""


def checkpoint_activations(model: nn.Module, settings: ActivationsConfig) -> None:
    """Make the blocks of ``model`` do in training what the settings say.

    Raises:
        UserError: a setting that this model cannot follow.
    """
    if not settings.gradient_checkpointing:
        return
    what, name = settings.checkpoint_activations, type(model).__name__
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing true: {name} cannot compute its activations again, in transformers itself; set "
            "gradient_checkpointing to false"
        )
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        attention = getattr(cast(Any, model).config, "_attn_implementation", None)
        if attention != "sdpa":
            raise UserError(
                f"checkpoint_activations selective: it keeps the outputs of attention by sdpa, and {name} has "
                f"{attention}; set attn_implementation to sdpa, or checkpoint_activations to full"
            )
        kernels = [getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default for kernel in _ATTENTION]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kernels)
    if not blocks and (isinstance(what, int) or settings.offload_activations):
        raise UserError(
            f"checkpoint_activations {what}, offload_activations {settings.offload_activations}: {name} does not "
            "checkpoint its blocks one by one; set checkpoint_activations to full, and offload_activations to false"
        )
    cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for number, block in enumerate(blocks):
        block.gradient_checkpointing = not isinstance(what, int) or number % what == 0
        if settings.offload_activations:
            block._gradient_checkpointing_func = partial(_on_host, block._gradient_checkpointing_func)


def _on_host(checkpoint: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What ``checkpoint`` keeps comes to the host and goes back; what is computed again stays on the device."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(*arguments, **named)
