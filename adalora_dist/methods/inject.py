"""``adapt``: a method's adapters into a model, the rest frozen; and what then is trained, for an optimizer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from adalora_dist.config.methods import MethodConfig, SizedConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.protocol import Adapter, carries_peft
from adalora_dist.methods.sites import trained_modules
from adalora_dist.sharding.agreement import this_rank

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)


def adapt(model: nn.Module, config: MethodConfig, seed: int = 0) -> list[Adapter]:
    """Put the adapters of ``config.method`` into ``model``; only they and ``train_modules`` stay trainable.

    Returns:
        The adapters in the order of ``model.named_modules()``, which fixes the order of triplets everywhere; none
        with the methods head and full.

    Raises:
        UserError: a target or train module that matches nothing, is not a linear map, is shared between two places,
            or has a weight tied to another module's; ``full`` with weights that are not float32; an ``init_from`` that
            does not fit the targets; a ``budget``, which :func:`~adalora_dist.methods.parameter_budget.within_budget`
            turns into sizes; PEFT's adapters in the model.
    """
    if carries_peft(model):
        raise UserError(
            "the model has PEFT's adapters: convert_peft(model) takes their place; or begin with a plain model"
        )
    if isinstance(config, SizedConfig) and config.budget is not None:
        raise UserError(f"budget={config.budget}: sizes come first: adapt(model, within_budget(model, config))")
    method = method_for(config)
    trained = trained_modules(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    _say_rounding(model)
    return method.adapt(model, torch.Generator().manual_seed(seed))


def _say_rounding(model: nn.Module) -> None:
    """Warn of what is trained in full in half precision, as a head is that was loaded with a backbone of today's."""
    rounded = [(name, p.dtype) for name, p in model.named_parameters() if p.requires_grad and p.dtype in _HALF]
    if rounded and this_rank() == 0:
        logger.warning(
            "%s is trained in %s, in which steps of less than %.1g of a weight are rounded away: with learning rates "
            "below about 1e-4 load the model in float32 (dtype), and compute in bf16 for speed (precision)",
            rounded[0][0], str(rounded[0][1]).removeprefix("torch."), torch.finfo(rounded[0][1]).eps / 2,
        )  # fmt: skip


def parameter_groups(model: nn.Module, config: MethodConfig, learning_rate: float) -> list[dict[str, Any]]:
    """What is trained in ``model``, as groups for a torch optimizer.

    Each group says in ``lr_ratio`` what its rate is multiplied by, 1 but for ``lora_plus_ratio``: whoever sets rates by
    hand keeps the ratio with it. (A scheduler that multiplies rates keeps it by itself.)
    """
    return method_for(config).parameter_groups(model, learning_rate)
