"""LoRA of stacked experts as PEFT has it: ``target_parameters``, with one rank for all experts of a stack.

Experts of a lower rank get zeros, so the function is the same. Files: methods/adalora/peft_stacks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from adalora_dist.artifacts.edits import stacks_among
from adalora_dist.backbones.experts import ExpertStack
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.peft_stacks import is_swapped, packed, wrapper_paths
from adalora_dist.methods.adalora.start import PREFIX
from adalora_dist.methods.update import AdapterWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExpertLora(NamedTuple):
    """What an adapter folder has of experts."""

    ranks: dict[str, int]
    """Of every stack, by its name: PEFT's ``target_parameters``, and what its patterns of ranks say of them."""
    tensors: dict[str, torch.Tensor]
    """By their names in the file."""
    parameters: dict[str, str]
    """By the path that PEFT gives an adapter, the name that its parameter has in the module."""
    others: list[AdapterWeights]
    """What is no expert of a stack."""


def expert_lora(adapters: Sequence[AdapterWeights], model: PreTrainedModel | None, least: int = 0) -> ExpertLora:
    """Split experts off.

    Args:
        adapters: of every adapted matrix, those of rank 0 included.
        model: the plain base; without it, what is named like experts of a stack is taken for them.
        least: rank of every stack that has one, at least; zeros make it up.

    Raises:
        UserError: stacks are transposed, and without a model nobody knows how PEFT takes them.
    """
    found = ExpertLora({}, {}, {}, [])
    factors: dict[ExpertStack, tuple[torch.Tensor, torch.Tensor]] = {}
    of_experts: set[str] = set()
    for stack, matrices in stacks_among(adapters).items():
        owner = _module(model, stack)
        if model is not None and owner is None:  # a list of experts, each a linear map
            continue
        if model is None and "expert" not in stack.owner.rpartition(".")[2]:  # layers.0.fc1, layers.1.fc1
            continue
        if owner is None and stack.is_transposed:
            raise UserError(
                f"{stack.name} is stored transposed, and how PEFT takes it depends on the model: give a base model "
                "whose config.json can be had, or export the merged model"
            )
        of_experts |= {matrix.name for matrix in matrices}
        rank = max(matrix.rank for matrix in matrices)
        if not rank:
            continue
        rank = max(rank, least)
        a = torch.stack([_padded(m.Q, rank) for m in matrices])  # (experts, r, d_in)
        b = torch.stack([_padded((m.P * (m.scale * m.lam)).T, rank) for m in matrices])  # (experts, r, d_out)
        found.ranks[stack.name] = rank
        factors[stack] = packed(a, b, is_swapped(stack, owner))
    for path, stack in wrapper_paths(list(factors)).items():
        found.parameters[path] = stack.leaf
        for kind, factor in zip(("lora_A", "lora_B"), factors[stack], strict=True):
            found.tensors[f"{PREFIX}{path}.{kind}.weight"] = factor
    found.others.extend(adapter for adapter in adapters if adapter.name not in of_experts)
    return found


def _module(model: PreTrainedModel | None, stack: ExpertStack) -> nn.Module | None:
    """What holds the stack; None where nothing does."""
    if model is None:
        return None
    try:
        module = model.get_submodule(stack.owner)
    except AttributeError:
        return None
    return module if stack.leaf in dict(module.named_parameters(recurse=False)) else None


def _padded(rows: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows)))
