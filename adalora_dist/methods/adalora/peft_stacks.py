"""How PEFT's files have LoRA of stacked experts (``target_parameters``): one rank r for all experts of a stack.

A of all experts lie one below the other, (experts * r, d_in); in B, (d_out, r * experts), the experts are what changes
fastest. Where PEFT takes a transposed stack for one that is not (Llama 4), A and B change places. Of several stacks in
one module each lies around the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from adalora_dist.backbones.experts import ExpertStack


def wrapper_paths(stacks: Sequence[ExpertStack]) -> dict[str, ExpertStack]:
    """By the path that PEFT gives its adapter, each of the stacks that have one; those of a module in its order."""
    paths = {}
    for owner, of_owner in groupby(stacks, key=attrgetter("owner")):
        for depth, stack in enumerate(reversed(list(of_owner))):
            paths[owner + ".base_layer" * depth] = stack
    return paths


def targeted(stacks: Iterable[ExpertStack], config: Mapping[str, Any]) -> list[ExpertStack]:
    """Those that an adapter_config.json names, by PEFT's rule: in full, or by the end."""
    names = [str(name) for name in config.get("target_parameters") or ()]
    return [stack for stack in stacks if any(f".{stack.name}".endswith(f".{name}") for name in names)]


def is_swapped(stack: ExpertStack, owner: nn.Module | None) -> bool:
    """Whether A and B change places; PEFT asks the module itself how its stacks lie."""
    return stack.is_transposed and not getattr(owner, "is_transposed", False)


def packed(a: torch.Tensor, b: torch.Tensor, swapped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A, lora_B) of a stack from A (experts, r, d_in) and B^T (experts, r, d_out)."""
    if swapped:
        a, b = b, a
    return a.flatten(0, 1), b.permute(2, 1, 0).flatten(1)


def unpacked(
    lora_a: torch.Tensor, lora_b: torch.Tensor, num_experts: int, swapped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of :func:`packed`."""
    a = lora_a.unflatten(0, (num_experts, -1))
    b = lora_b.unflatten(1, (-1, num_experts)).permute(2, 1, 0)
    return (b, a) if swapped else (a, b)
