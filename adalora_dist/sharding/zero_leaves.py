"""Blocks of experts under ZeRO-3, which gathers them as a whole ("leaves"). Imports nothing of DeepSpeed's.

A leaf's backward is over, to DeepSpeed, when the gradient of its input is there: what has none by then gets zeros.
Where nothing before the block is trained its input has none, and the end comes before the gradients of the block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def ask_for_input_gradients(model: nn.Module) -> None:
    """Have the gradients of blocks of experts be there before ZeRO-3 takes their backward to be over.

    Blocks are made leaves when the engine is built, which may be later: so each call looks. No effect elsewhere.
    """
    for module in model.modules():
        if "experts" in module._modules:
            module.register_forward_pre_hook(_ask_for_input_gradient, prepend=True, with_kwargs=True)


def _ask_for_input_gradient(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    if getattr(module, "_z3_leaf", False) and torch.is_grad_enabled():
        given = [x for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if given and not any(x.requires_grad for x in given):
            given[0].requires_grad_()
