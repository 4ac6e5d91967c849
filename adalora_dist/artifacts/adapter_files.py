"""What adapter.json and task.json of an adapter folder say, checked: the folder may be anybody's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object
from adalora_dist.sharding.tensors import class_name

FORMAT = 2
"""Of folders that hold triplets."""
FORMAT_OF_METHODS = 3
"""Of folders that hold what one method alone leaves, and so name it; older versions refuse them."""


class AdapterDescription(BaseModel):
    """adapter.json; every matrix is in each of the tables."""

    format: int = FORMAT
    base_model: str
    base_revision: str | None
    update: str = "W = W0 + scale * P diag(lam) Q"
    scales: dict[str, FiniteFloat]
    rank_pattern: dict[str, NonNegativeInt]
    shapes: dict[str, tuple[PositiveInt, PositiveInt]]
    """d_out, d_in."""
    transposed: list[str]


class MethodDescription(AdapterDescription):
    """adapter.json of a method that leaves something else than triplets."""

    format: int = FORMAT_OF_METHODS
    method: str
    settings: dict[str, Any]
    """What holds for all matrices together; the method's update checks it."""


class TaskSettings(BaseModel):
    """task.json: of config.json, what makes a model one of its task. Other keys are not taken over."""

    architectures: list[str] = Field(min_length=1)
    id2label: dict[str, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    classifier_dropout: float | None = None
    cls_dropout: float | None = None
    pad_token_id: int | None = None


def read_description(folder: Path) -> AdapterDescription:
    """adapter.json of an adapter folder.

    Raises:
        UserError: it cannot be read, is of another format, or is incomplete.
    """
    path = folder / "adapter.json"
    content = read_object(path)
    kinds: dict[int, type[AdapterDescription]] = {FORMAT: AdapterDescription, FORMAT_OF_METHODS: MethodDescription}
    kind = kinds.get(content["format"]) if isinstance(content.get("format"), int) else None
    if kind is None:
        formats = " or ".join(map(str, kinds))
        raise UserError(f"{path}: format {content.get('format')!r:.50} is not {formats}: export the run again")
    try:
        described = kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}: copy it again") from None
    for name in described.rank_pattern:
        if not name.isprintable():
            raise UserError(f"{path}: {name!r:.80} is not the name of a matrix: do not use this adapter")
        if name not in described.scales or name not in described.shapes:
            raise UserError(f"{path} is incomplete (scale or shape of {name}): copy it again")
    return described


def task_settings(model: nn.Module) -> dict[str, Any]:
    """Of a model's config.json, what makes it one of its task: its class, its labels, what else its head asks for."""
    own = cast(Any, model).config.to_dict()
    return {"architectures": [class_name(model)]} | {
        key: own[key] for key in TaskSettings.model_fields if key != "architectures" and own.get(key) is not None
    }


def checked_task(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a task in what was read from ``where``; empty where there are none.

    Raises:
        UserError: one of them is not what it should be.
    """
    if not content:
        return {}
    try:
        return TaskSettings.model_validate(content).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error)}: copy it again") from None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(repr, first['loc']))} ({first['msg']})"
