"""Where the matrices of a stack of experts lie in a model's files: in a tensor for each, in several, or in one of all.

Files have gate and up of every expert for itself; transformers lays the two side by side and stacks the experts. So
each row of a stack is a row of one tensor of the files, and can be read, or written, by itself.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from adalora_dist.backbones.experts import ExpertStack
from adalora_dist.backbones.files import Stored
from adalora_dist.backbones.names import FileNames
from adalora_dist.io.errors import UserError


class ExpertPart(NamedTuple):
    """A tensor of the files, and what of a stack it is."""

    stored: Stored
    expert: int | None
    """Whose matrix it is, or whose rows; None: the whole stack."""
    start: int
    """The first of its rows in the expert's matrix (d_out, d_in); the others follow."""
    stop: int
    is_turned: bool = False
    """Whether its matrices lie the other way round than the model's."""


def parts_of(names: FileNames, stack: ExpertStack) -> list[ExpertPart]:
    """All that a stack is made of, expert after expert.

    Raises:
        UserError: it is in no file, or is made of other tensors in another way than by stacking.
    """
    name = names.known_as(stack.name)
    sources = names.sources.get(name, ())
    if not sources:
        raise UserError(f"{stack.name} of {names.model_class} is not in its files: leave it out of targets")
    operations = _operations(names, sources[0]) if name in names.computed else ()
    if operations in ((), _TURNED, _TURNED_IF_NEEDED):
        stored, sizes = sources[0], _sizes(stack)
        is_turned = operations == _TURNED or (operations == _TURNED_IF_NEEDED and stored.shape[1:] != sizes)
        _compare(stack, stored, (stack.num_experts, *(sizes[::-1] if is_turned else sizes)))
        return [ExpertPart(stored, None, 0, stack.d_out, is_turned)]
    parts = _stacked(names, stack, sources)
    for part in parts:
        _compare(stack, part.stored, (part.stop - part.start, stack.d_in))
    rows = [0] * stack.num_experts
    for part in parts:
        expert = part.expert or 0
        rows[expert] += part.stop - part.start
    if stack.is_transposed or set(rows) != {stack.d_out}:
        raise _unknown(stack, names)
    return parts


def _operations(names: FileNames, stored: Stored) -> tuple[str, ...] | None:
    conversion = names.rules.conversion_of(stored.key) if names.rules is not None else None
    return None if conversion is None else conversion.operations


def _stacked(names: FileNames, stack: ExpertStack, sources: tuple[Stored, ...]) -> list[ExpertPart]:
    by_expert: dict[int, dict[int, Stored]] = {}
    for stored in sources:
        conversion = names.rules.conversion_of(stored.key) if names.rules is not None else None
        if conversion is None or conversion.operations not in (("MergeModulelist 0",), _SIDE_BY_SIDE):
            raise _unknown(stack, names)
        spelt = re.sub(r"\\(.)", r"\1", conversion.pattern)  # some tables escape their dots, most do not
        found = re.search(re.escape(spelt).replace(r"\*", r"(\d+)"), stored.key)
        if found is None or not found.groups() or int(found[1]) >= stack.num_experts:
            raise _unknown(stack, names)
        by_expert.setdefault(int(found[1]), {})[conversion.position] = stored
    parts = []
    for expert, tensors in sorted(by_expert.items()):
        start = 0
        for _, stored in sorted(tensors.items()):
            parts.append(ExpertPart(stored, expert, start, start + stored.shape[0]))
            start += stored.shape[0]
    return parts


_SIDE_BY_SIDE = ("MergeModulelist 0", "Concatenate 1")
_TURNED, _TURNED_IF_NEEDED = ("Transpose 1 2",), ("Transpose 1 2 if needed",)


def _sizes(stack: ExpertStack) -> tuple[int, int]:
    return (stack.d_in, stack.d_out) if stack.is_transposed else (stack.d_out, stack.d_in)


def _compare(stack: ExpertStack, stored: Stored, shape: tuple[int, ...]) -> None:
    if tuple(stored.shape) != shape:
        raise UserError(
            f"{stored.file}: tensor {stored.key} has shape {tuple(stored.shape)}, {stack.name} takes {shape}: use the "
            "run's own base, not quantised"
        )


def _unknown(stack: ExpertStack, names: FileNames) -> UserError:
    return UserError(
        f"{stack.name} of {names.model_class} is made of its files' tensors in another way than by stacking experts: "
        "it can neither be read by rows nor written back: leave experts out of targets, or load it whole (ZeRO, DDP) "
        "and leave merged out of export_formats"
    )
