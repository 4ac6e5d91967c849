"""Merging into tensors of the files that are no parameters by themselves: those of experts, and what is rearranged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from adalora_dist.backbones.expert_files import parts_of
from adalora_dist.backbones.experts import ExpertStack, place_of
from adalora_dist.backbones.names import FileNames
from adalora_dist.backbones.rearranged import Change, Rearranged
from adalora_dist.methods.update import AdapterWeights, Update

Edit = Callable[[torch.Tensor], torch.Tensor]
"""A float32 tensor of the files, which may be changed in place -> the merged one."""


def stacks_among(adapters: Sequence[Update]) -> dict[ExpertStack, list[AdapterWeights]]:
    """The matrices whose names are those of experts in a stack, expert after expert: all, or none of a stack."""
    found: dict[str, dict[int, AdapterWeights]] = {}
    for adapter in adapters:
        if (place := place_of(adapter.name)) is not None and isinstance(adapter, AdapterWeights):
            found.setdefault(place[0], {})[place[1]] = adapter
    stacks = {}
    for name, by_expert in found.items():
        if sorted(by_expert) == list(range(len(by_expert))):
            d_out, d_in = by_expert[0].matrix.shape
            stack = ExpertStack(name, len(by_expert), d_in, d_out, by_expert[0].weight_is_transposed)
            stacks[stack] = [by_expert[expert] for expert in range(len(by_expert))]
    return stacks


def expert_edits(adapters: Sequence[Update], names: FileNames) -> tuple[list[Update], dict[str, Edit]]:
    """What is no expert in a stack, and by its key in the files what to do with each tensor of those that are.

    Raises:
        UserError: as :func:`adalora_dist.backbones.expert_files.parts_of`.
    """
    edits: dict[str, Edit] = {}
    of_experts: set[str] = set()
    for stack, matrices in stacks_among(adapters).items():
        if names.known_as(stack.name) not in names.sources:  # a list of experts, each with a weight of its own
            continue
        of_experts |= {matrix.name for matrix in matrices}
        for part in parts_of(names, stack):
            if part.expert is None:
                turned = [replace(m, weight_is_transposed=m.weight_is_transposed ^ part.is_turned) for m in matrices]
                edits[part.stored.key] = partial(_add_all, turned)
            elif (matrix := matrices[part.expert]).rank:
                edits[part.stored.key] = replace(matrix, P=matrix.P[part.start : part.stop]).merged
    return [adapter for adapter in adapters if adapter.name not in of_experts], edits


def _add_all(matrices: Sequence[AdapterWeights], stack: torch.Tensor) -> torch.Tensor:
    for matrix, weight in zip(matrices, stack, strict=True):
        if matrix.rank:
            matrix.add_to(weight)
    return stack


def rearranged_edits(changes: Mapping[str, Change], names: FileNames) -> dict[str, Edit]:
    """By its key in the files, what to do with each tensor that parameters which have changed are made of.

    Args:
        changes: by parameter name.

    Raises:
        UserError: as :class:`~adalora_dist.backbones.rearranged.Rearranged`.
    """
    together: dict[tuple[str, ...], tuple[Rearranged, dict[str, Change]]] = {}
    for name, change in changes.items():
        found = Rearranged(names, name)
        together.setdefault(found.keys, (found, {}))[1][name] = change
    return {
        key: partial(found.changed, key, changes=of_these)
        for found, of_these in together.values()
        for key in found.keys
    }
