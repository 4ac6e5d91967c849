"""What a loop of one's own has trained, written with all that belongs to it: the verbs of docs/api.md.

``hooks.updates()`` knows what was trained in full besides, and the model that was trained. So a new head, its labels
and the class that has it are in what is written without being named again. Whatever is given explicitly counts instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adalora_dist.artifacts import export, peft_format
from adalora_dist.artifacts.adapter_files import task_settings
from adalora_dist.artifacts.base_weights import BaseWeight
from adalora_dist.backbones.files import base_folder_of
from adalora_dist.backbones.loaded import refuse_lost_parts
from adalora_dist.backbones.names import FileNames, plain_model
from adalora_dist.io.errors import UserError
from adalora_dist.methods.update import AdapterWeights, Update
from adalora_dist.methods.updates import Updates

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Folder = str | Path


def save_adapter(
    adapters: Sequence[Update],
    folder: Folder,
    base_model: str | None = None,
    base_revision: str | None = None,
    trained: Mapping[str, torch.Tensor] | None = None,
    task: Mapping[str, Any] | None = None,
) -> None:
    """As :func:`adalora_dist.artifacts.export.save_adapter`.

    Args:
        base_model: Hub id or folder of the backbone; None: where the trained model came from.

    Raises:
        UserError: as there; the base is not known.
    """
    name, revision = _base(adapters, base_model, base_revision)
    if name is None:
        raise UserError(f"{folder}: the base of this adapter is not known: give base_model, its folder or Hub id")
    export.save_adapter(adapters, Path(folder), name, revision, _trained(adapters, trained), _task(adapters, task))


def merge(
    adapters: Sequence[Update],
    base_folder: Folder,
    folder: Folder,
    dtype: torch.dtype | None = None,
    trained: dict[str, torch.Tensor] | None = None,
    base_weights: Mapping[str, BaseWeight] | None = None,
    task: Mapping[str, Any] | None = None,
    show_progress: bool = True,
    names: FileNames | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """As :func:`adalora_dist.artifacts.export.merge`.

    Args:
        base_folder: or the name of a model on the Hub, as it was loaded.

    Raises:
        UserError: as there; the Hub's files cannot be had.
    """
    _, revision = _base(adapters, str(base_folder), None)
    if names is None and isinstance(adapters, Updates):
        names = getattr(adapters.model, "file_names", None)
    export.merge(
        adapters, base_folder_of(str(base_folder), revision), Path(folder), dtype, _trained(adapters, trained),
        base_weights, _task(adapters, task), show_progress, names, tokenizer,
    )  # fmt: skip


def save_lora(
    adapters: Sequence[Update],
    folder: Folder,
    base_model: str | None = None,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, torch.Tensor] | None = None,
    model: PreTrainedModel | None = None,
    pad: bool = False,
) -> None:
    """As :func:`adalora_dist.artifacts.peft_format.save_lora`, of any method whose updates are of low rank.

    Args:
        base_model: Hub id or folder of the backbone; None: where the trained model came from.
        model: None: the plain model of the one that was trained, where that is transformers'.

    Raises:
        UserError: as there; an update is no sum of low rank.
    """
    base = _base(adapters, base_model, base_revision)
    low_rank, plain = _low_rank(adapters, folder), _plain(adapters, model)
    peft_format.save_lora(low_rank, Path(folder), *base, dtype, _trained(adapters, trained), plain, pad)


def save_adalora(
    adapters: Sequence[Update],
    folder: Folder,
    base_model: str | None = None,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, torch.Tensor] | None = None,
    model: PreTrainedModel | None = None,
) -> None:
    """As :func:`adalora_dist.artifacts.peft_format.save_adalora`; arguments and errors as of :func:`save_lora`."""
    base = _base(adapters, base_model, base_revision)
    low_rank, plain = _low_rank(adapters, folder), _plain(adapters, model)
    peft_format.save_adalora(low_rank, Path(folder), *base, dtype, _trained(adapters, trained), plain)


def _base(adapters: Sequence[Update], name: str | None, revision: str | None) -> tuple[str | None, str | None]:
    """Name and commit of the base. A commit goes with the name that the model was loaded by."""
    config = getattr(_known_model(adapters), "config", None)
    own = getattr(config, "_name_or_path", "") or None
    if revision is None and name in (None, own):
        revision = getattr(config, "_commit_hash", None)
    return name or own, revision


def _trained(adapters: Sequence[Update], given: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """What is written besides the updates.

    Raises:
        UserError: the model has parts that are neither in this nor in its files.
    """
    trained = dict(given) if given is not None else adapters.trained if isinstance(adapters, Updates) else {}
    if isinstance(adapters, Updates) and adapters.model is not None:
        refuse_lost_parts(adapters.model, {f"{update.name}.weight" for update in adapters}, trained)
    return trained


def _task(adapters: Sequence[Update], given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    model = _known_model(adapters)
    return given if given is not None or model is None else task_settings(model)


def _plain(adapters: Sequence[Update], given: PreTrainedModel | None) -> PreTrainedModel | None:
    model = _known_model(adapters)
    return given if given is not None or model is None else plain_model(model.config, task_settings(model))


def _known_model(adapters: Sequence[Update]) -> Any:
    """The model that was trained, where it is known and transformers'."""
    model = adapters.model if isinstance(adapters, Updates) else None
    return model if hasattr(getattr(model, "config", None), "to_dict") else None


def _low_rank(adapters: Sequence[Update], folder: Folder) -> list[AdapterWeights]:
    found = []
    for update in adapters:
        if (weights := update.as_lora()) is None:
            raise UserError(
                f"{folder}: {update.name}: what {update.method} leaves is no plain LoRA, which this form holds: use "
                "save_adapter, or merge where the method can be merged"
            )
        found.append(weights)
    return found
