"""What a checkpoint may say: checked as a whole before any of it is used, to be continued or exported.

A manifest proves that the files are those that were written, not that what wrote them was right, or honest. A
checkpoint that fails here counts as damaged, so that the one before it is taken.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StrictStr, ValidationError
from safetensors import SafetensorError, safe_open

from adalora_dist.artifacts.checkpoints.files import Damaged, step_of
from adalora_dist.io.errors import UserError, printable
from adalora_dist.io.foreign_files import parse_object, read_object

STATE = "state.json"

Dimensions = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 48)]], Field(max_length=8)]
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class ParameterState(_Strict):
    """Of a trained parameter: its whole shape, the optimizer's step, and which moments there are."""

    shape: Dimensions
    step: Finite | None
    state: list[StrictStr]


class Counters(_Strict):
    """Of the method; methods without adapters once kept nothing of their own."""

    step: NonNegativeInt | None = None
    num_skipped_steps: NonNegativeInt = 0
    allocation_steps: list[NonNegativeInt] = []
    allocation_budgets: list[NonNegativeInt] = []


class State(_Strict):
    """state.json."""

    step: NonNegativeInt
    allocator: Counters
    parameters: dict[str, ParameterState]
    kept: dict[str, Dimensions] = {}
    """Whole shapes of what the method keeps besides."""
    triplets: dict[str, list[NonNegativeInt]]
    matrices: dict[str, dict[str, Any]]
    """What each adapter says of itself, which is its method's own affair."""
    run: dict[str, Any]


def check_content(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The content of state.json, of a checkpoint whose files are those of its manifest.

    Args:
        names: of the files that the manifest vouches for.

    Raises:
        Damaged: something is missing, of another type, contradicts something else, or is no finite number.
    """
    path = folder / STATE
    try:
        content = read_object(path)
        state = State.model_validate(content)
    except UserError as error:
        raise Damaged(str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(f"{path}: {printable(where, 100)} ({printable(first['msg'], 100)})") from None
    if problem := _contradiction(state, folder):
        raise Damaged(f"{path}: {printable(problem)}")
    for name in sorted(name for name in names if name.endswith(".safetensors")):
        _check_shard(folder / name, state)
    return content


def _contradiction(state: State, folder: Path) -> str | None:
    counters = state.allocator
    if step_of(folder) not in (None, state.step):
        return f"step {state.step} in the folder {folder.name}"
    if counters.step not in (None, state.step):
        return f"the allocator is at step {counters.step}, the run at {state.step}"
    steps = counters.allocation_steps
    if len(steps) != len(counters.allocation_budgets) or steps != sorted(set(steps)):
        return "allocations are not one after the other, each with its budget"
    if state.triplets.keys() != state.matrices.keys():
        return "triplets and matrices are not of the same names"
    for name, described in state.matrices.items():
        for key, value in described.items():
            if isinstance(value, float) and not math.isfinite(value):
                return f"{key} of {name} is {value}"
        held, num_parts = state.triplets[name], described.get("init_rank", math.inf)
        if held != sorted(set(held)) or not isinstance(num_parts, int | float) or (held and held[-1] >= num_parts):
            return f"triplets of {name} are not some of its {num_parts}, each once"
    return None


def _check_shard(path: Path, state: State) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            spans = parse_object((file.metadata() or {})["spans"].encode(), str(path))
            for name, span in spans.items():
                start, stop = span
                size = math.prod(state.kept[name] if name in state.kept else state.parameters[name].shape)
                if not (type(start) is type(stop) is int and 0 <= start < stop <= size):
                    raise Damaged(f"{path}: the part {printable(span, 60)} of {printable(name, 100)} is none")
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise Damaged(f"{path}: {printable(key, 100)} has values that are not finite")
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise Damaged(f"{path} does not hold what {STATE} describes ({printable(repr(error))})") from None
