"""What a run leaves behind: the adapter alone, and a merged model that plain transformers loads.

W = W0 + s P diag(lambda) Q, or what the method's update says. Merging goes through the backbone's own safetensors
files, one file at a time, so it needs no model in memory, works the same after every engine, and leaves everything that
was not adapted bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adalora_dist.artifacts.adapted_model import save_as_adapter
from adalora_dist.artifacts.adapter_files import (
    AdapterDescription,
    MethodDescription,
    checked_task,
    read_description,
)
from adalora_dist.artifacts.adapter_files import task_settings as task_settings
from adalora_dist.artifacts.base_weights import BaseWeight as BaseWeight
from adalora_dist.artifacts.edits import expert_edits, rearranged_edits
from adalora_dist.artifacts.trained import put_trained
from adalora_dist.artifacts.whole import apart, check_files, check_whole, is_model_file
from adalora_dist.backbones.files import base_folder_of as base_folder_of
from adalora_dist.backbones.files import refuse_foreign_link, weight_files
from adalora_dist.backbones.names import FileNames, names_in
from adalora_dist.backbones.rearranged import Change, check_shape, is_rearranged
from adalora_dist.backbones.tokenizer import save_tokenizer
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import check_tensors, read_object
from adalora_dist.io.progress import progress_bar
from adalora_dist.io.publish import building
from adalora_dist.io.redaction import redacted
from adalora_dist.methods import METHODS
from adalora_dist.methods.protocol import Adapter
from adalora_dist.methods.update import Matrix, Update, weight_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOT_COPIED = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|onnx_data)"
    r"|.*\.index(\.[^.]+)?\.json"  # of weights that stay behind; a loader would look for them, or find half of them
    r"|README\.md"  # the base's model card is not this model's
)
"""Names of what a merged model does not take over from its base."""


def save_adapter(
    adapters: Sequence[Update],
    folder: Path,
    base_model: str,
    base_revision: str | None,
    trained: Mapping[str, torch.Tensor] | None = None,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Write adapter.safetensors (for triplets NAME.P, NAME.lam, NAME.Q of the active ones), adapter.json, and the rest.

    Args:
        adapters: of every adapted matrix.
        folder: of an earlier adapter, which is replaced as a whole, or one that does not exist.
        trained: what was trained in full, by parameter name, as trained.safetensors:
            ``model.load_state_dict(load_file(...), strict=False)`` puts it back.
        task: from :func:`task_settings`, as task.json.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    tensors = {f"{a.name}.{kind}": tensor for a in adapters for kind, tensor in a.tensors().items()}
    weights = {"adapter.safetensors": tensors} | ({"trained.safetensors": apart(trained)} if trained else {})
    description = _described(adapters, base_model, base_revision)
    with building(folder, replaces=is_adapter) as scratch:
        for name, content in weights.items():
            save_file(content, scratch / name, metadata={"format": "pt"})
        _write_json(description.model_dump(), scratch / "adapter.json")
        if task is not None:
            _write_json(task, scratch / "task.json")
        check_whole(scratch, weights)


def _described(adapters: Sequence[Update], base_model: str, base_revision: str | None) -> AdapterDescription:
    matrices = [a.matrix for a in adapters]
    tables: dict[str, Any] = {
        "base_model": redacted(base_model),
        "base_revision": base_revision,
        "scales": {m.name: m.scale for m in matrices},
        "rank_pattern": {m.name: m.rank for m in matrices},
        "shapes": {m.name: m.shape for m in matrices},
        "transposed": [m.name for m in matrices if m.is_transposed],
    }
    if adapters and (method := adapters[0].method):
        return MethodDescription(**tables, update=adapters[0].formula, method=method, settings=adapters[0].settings())
    return AdapterDescription(**tables)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is one that :func:`save_adapter` has written, or empty."""
    return (folder / "adapter.json").is_file() or not any(folder.iterdir())


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder, read."""

    adapters: Sequence[Update]
    base_model: str
    base_revision: str | None
    trained: dict[str, torch.Tensor]
    """What was trained in full, by parameter name."""
    task: dict[str, Any]
    """Of config.json, what makes the model one of its task; empty where nothing does."""


def read_adapter(folder: Path) -> SavedAdapter:
    """What :func:`save_adapter` wrote; needs no model.

    Raises:
        UserError: the folder is not an adapter of this format, or is incomplete.
    """
    try:
        described = read_description(folder)
        for name in ("adapter.safetensors", "trained.safetensors"):
            if (folder / name).exists():
                check_tensors(folder / name)
        tensors = load_file(folder / "adapter.safetensors")
        trained = load_file(file) if (file := folder / "trained.safetensors").is_file() else {}
        task = checked_task(read_object(file), str(file)) if (file := folder / "task.json").is_file() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold an adapter (adapter.json, adapter.safetensors): {error}") from error
    method, settings = "adalora", {}
    if isinstance(described, MethodDescription):
        method, settings = described.method, described.settings
    if method not in METHODS:
        raise UserError(f"{folder}/adapter.json: there is no method {method!r:.50}: use the version that wrote it")
    kind, matrices, parts = METHODS[method].update, [], {}
    for name, rank in described.rank_pattern.items():
        matrix = Matrix(name, described.shapes[name], rank, described.scales[name], name in described.transposed)
        shapes = kind.shapes(matrix, settings)
        for part, shape in shapes.items():
            if (key := f"{name}.{part}") not in tensors or tensors[key].shape != shape:
                raise UserError(
                    f"{folder}/adapter.safetensors has no tensor {key} of shape {shape}, which adapter.json "
                    "promises: copy both"
                )
        matrices.append(matrix)
        parts[name] = {part: tensors[f"{name}.{part}"].float() for part in shapes}
    adapters = kind.read(matrices, parts, settings)
    return SavedAdapter(adapters, described.base_model, described.base_revision, trained, task)


def load_adapter(model: nn.Module, folder: str | Path) -> list[Adapter]:
    """Put a saved adapter into its plain backbone, every matrix at its own rank (0: no branch).

    What was trained in full besides takes the place of the model's. From then on ``model.save_pretrained(folder)``
    writes the adapter, for PEFT.

    Raises:
        UserError: the folder is not an adapter of this format, or does not fit the model.
    """
    saved = read_adapter(Path(folder))
    adapters = saved.adapters
    if not adapters:
        put_trained(model, saved.trained, saved.task, folder)
        return []
    method = METHODS[adapters[0].method or "adalora"]
    shape_of = method.shapes_in(model)
    for adapter in adapters:
        shape = shape_of(adapter.name)
        if shape is None:
            raise UserError(f"{folder}: the adapter's matrix {adapter.name} is not in this model: load its base model")
        if shape[::-1] != adapter.matrix.shape:
            (d_out, d_in), (rows, columns) = shape[::-1], adapter.matrix.shape
            raise UserError(
                f"{folder}: {adapter.name} is {rows} x {columns} there, but the model's matrix is {d_out} x {d_in}: "
                "load its base model"
            )
    put_trained(model, saved.trained, saved.task, folder)
    layers = method.place(model, adapters)
    save_as_adapter(model, method)
    return layers


def merge(
    adapters: Sequence[Update],
    base_folder: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    trained: dict[str, torch.Tensor] | None = None,
    base_weights: Mapping[str, BaseWeight] | None = None,
    task: Mapping[str, Any] | None = None,
    show_progress: bool = True,
    names: FileNames | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write the merged model: the base's files with each update of W0, such as W0 + s P diag(lambda) Q, in its place.

    Built beside ``folder``, read again, and renamed when it is whole. Sums are float32; ``dtype`` None keeps each
    tensor's type.

    Args:
        adapters: of every adapted matrix.
        base_folder: the backbone as transformers saved it, in safetensors.
        folder: must not exist.
        dtype: of all floating-point weights written.
        trained: full tensors that training replaced (``train_modules``), by parameter name. Each takes the place of
            the tensor that it was loaded from, whatever its name and, for a new head, its shape in the files. Those
            that the files lack, a new classifier's, are added to the last file.
        base_weights: by parameter name, what takes the place of a tensor of the files before its update is added,
            for instance its quantised value. Default: W0 as the files have it.
        task: from :func:`task_settings`, what config.json says instead of the base's.
        names: of the trained model in the base's files. Default: found out from the class that ``task`` or config.json
            names, built on the meta device.
        tokenizer: takes the place of the base's.

    Raises:
        UserError: the updates are no matrices; as :func:`check_base`; the base lacks the weight of an adapted matrix in
            its shape; as of :func:`adalora_dist.io.publish.building`.
    """
    if adapters and adapters[0].not_merged:
        raise UserError(f"{adapters[0].name}: {adapters[0].not_merged}")
    check_base(base_folder)
    shards = weight_files(base_folder)
    settings = read_object(base_folder / "config.json")
    replaced: dict[str, Change] = {}
    whole = dict(trained or {})
    bases = dict(base_weights or {})
    names = names_in(base_folder, task or {}) if names is None else names
    others, edits = expert_edits(adapters, names)
    shapes: dict[str, tuple[int, ...]] = {name: base.shape for name, base in bases.items()}
    for adapter in (a for a in others if a.tensors()):
        replaced[name := f"{adapter.name}.weight"], shapes[name] = adapter.merged, weight_shape(adapter)
        if adapter.changes_bias and names.has(name := f"{adapter.name}.bias"):
            replaced[name], shapes[name] = adapter.merged_bias, adapter.matrix.shape[:1]

    def change(name: str, stored: torch.Tensor) -> torch.Tensor:
        if name in whole:
            return whole[name]
        weight = bases[name](stored) if name in bases else stored.to(torch.float32, copy=True)
        return replaced[name](weight) if name in replaced else weight

    moved = {name: partial(change, name) for name in {**shapes, **whole} if is_rearranged(names, name)}
    for name in moved.keys() & shapes.keys():
        check_shape(names, name, shapes[name])
    edits |= rearranged_edits(moved, names)
    unmoved = {name: shape for name, shape in shapes.items() if name not in moved}
    places, new = names.places(unmoved, whole.keys() - moved.keys(), base_folder)
    added = {name: whole[name].contiguous() for name in sorted(new)}
    if dtype is not None:
        settings = {key: value for key, value in settings.items() if key != "torch_dtype"}
        settings["dtype"] = str(dtype).removeprefix("torch.")

    def merged(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if (name := places.get(key)) is not None:
            tensor = change(name, tensor).to(tensor.dtype if name in whole else dtype or tensor.dtype)
        elif key in edits:
            tensor = edits[key](tensor.to(torch.float32, copy=True)).to(dtype or tensor.dtype)
        return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()

    def write(shard: Path, target: Path) -> dict[str, int]:
        """One file; the bytes of its tensors by name."""
        with safe_open(shard, framework="pt") as file:
            tensors = {key: merged(key, file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
            if shard == shards[-1]:
                tensors |= {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in added.items()}
            save_file(tensors, target, metadata=file.metadata() or {"format": "pt"})
        return {key: tensor.nbytes for key, tensor in tensors.items()}

    with building(folder) as scratch:
        weights: dict[str, dict[str, int]] = {}
        for shard in progress_bar(shards, desc="merge", unit="file", show=show_progress):
            weights[shard.name] = write(shard, scratch / shard.name)
        for path in base_folder.iterdir():
            if _is_copied(path):
                shutil.copyfile(path, scratch / path.name)
        if shards[0].name != "model.safetensors":
            own = read_object(base_folder / "model.safetensors.index.json").get("metadata")
            total_size = sum(sum(sizes.values()) for sizes in weights.values())
            metadata = {**(own if isinstance(own, dict) else {}), "total_size": total_size}
            weight_map = {key: name for name, keys in weights.items() for key in keys}
            _write_json({"metadata": metadata, "weight_map": weight_map}, scratch / "model.safetensors.index.json")
        if dtype is not None or task:
            _write_json(with_task(settings, task or {}), scratch / "config.json")
        if tokenizer is not None:
            save_tokenizer(tokenizer, scratch)
        check_whole(scratch, weights)


def with_task(settings: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the settings of a task; the padding id also where a model of several parts has its text's."""
    changed = dict(settings) | dict(task)
    if "pad_token_id" in task:
        for part in ("text_config", "text_encoder", "decoder", "generator"):  # as get_text_config looks for them
            if isinstance(own := changed.get(part), dict):
                changed[part] = own | {"pad_token_id": task["pad_token_id"]}
    return changed


def check_base(base_folder: Path) -> None:
    """Raise a ``UserError`` if nothing can be merged into a model folder.

    That is: it has no safetensors, is an adapter, is quantised, has a link out of itself, or a file of words or
    settings that cannot be read.
    """
    if (base_folder / "adapter_config.json").is_file():  # which transformers would put on top of what is merged
        raise UserError(f"{base_folder} is an adapter (adapter_config.json): merge into the model that it belongs to")
    if not weight_files(base_folder):
        raise UserError(
            f"{base_folder} has no .safetensors files to merge into: save the base model with save_pretrained"
        )
    if quantized := read_object(base_folder / "config.json").get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        raise UserError(
            f"{base_folder} is quantised ({method or 'quantization_config in its config.json'}), and nothing can be "
            "added to such weights: merge into the original model, or leave merged out of export_formats"
        )
    copied = [path for path in sorted(base_folder.iterdir()) if _is_copied(path)]
    for path in copied:
        refuse_foreign_link(path)
    check_files(path for path in copied if is_model_file(path.name))


def _is_copied(path: Path) -> bool:
    return path.is_file() and not _NOT_COPIED.fullmatch(path.name)


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
