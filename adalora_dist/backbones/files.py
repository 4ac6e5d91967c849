"""Where a backbone lies on disk: its folder, and the weight files in it and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object

_BASE_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]  # weights, configurations, tokenizers


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: model.safetensors, else those of its index, else none.

    A folder may hold others, such as the consolidated.safetensors that some publishers put beside them.

    Raises:
        UserError: as :func:`indexed_files`.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    return sorted(set(indexed_files(index).values())) if index.is_file() else []


def indexed_files(index: Path) -> dict[str, Path]:
    """The file of each tensor by the tensor's name, from a ``model.safetensors.index.json``.

    Files are read from, and merged models written to, the names that an index gives; and indexes come from anywhere.

    Raises:
        UserError: it is no index, or names a file that is not a plain .safetensors name in the index's own folder.
    """
    try:
        weight_map = read_object(index)["weight_map"]
        names = set(weight_map.values())
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors files ({error}): fetch the model again") from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", name):
            raise UserError(
                f"{index} names the file {name!r:.80}: must be a plain name such as "
                "model-00001-of-00002.safetensors, in the same folder; do not use this model"
            )
    return {key: index.with_name(name) for key, name in weight_map.items()}


def find_tensors(
    shapes: Mapping[str, tuple[int, ...]], shards: Sequence[Path], base_folder: Path, may_lack: Container[str]
) -> dict[str, str]:
    """Key in the files -> parameter name. A base saved without its head lacks the leading 'model.' or the like.

    Raises:
        UserError: a file is missing or cut off, or there is no tensor of that name and shape.
    """
    found: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{shard} is not a whole safetensors file ({error}): fetch the model again") from error
    places = {}
    for name, shape in shapes.items():
        key = next((key for key in (name, name.partition(".")[2]) if key in found), None)
        if key is None and name in may_lack:
            continue
        if key is None:
            raise UserError(f"{base_folder}: no tensor {name} in its .safetensors files: merge into the run's own base")
        if found[key] != shape:
            raise UserError(
                f"{base_folder}: tensor {key} has shape {found[key]}, the run's has {shape}: merge into the run's own "
                "base, not quantised"
            )
        places[key] = name
    return places


def refuse_foreign_link(path: Path) -> None:
    """Raise unless a file of a model's folder is in it, or in the Hub's cache beside it, where links are the rule.

    Raises:
        UserError: it is a link to somewhere else, whose content an export would carry along.
    """
    folder, target = path.parent.resolve(), path.resolve()
    if not any(target.is_relative_to(root) for root in (folder, folder.parent.parent / "blobs")):
        raise UserError(
            f"{path} is a link to {target}, out of the model's folder: remove it, or put the file itself there"
        )


def is_module_pattern(key: object) -> bool:
    """Whether a key of PEFT's rank_pattern is a name or a simple pattern that can be matched without a second thought.

    Anyone can have written it, and a regular expression with nested repetitions takes for ever. So the only repetition
    is ``.*``, three times at most.
    """
    if not isinstance(key, str) or not re.fullmatch(r"(?:[\w\\^$|()-]|\.\*?)+", key) or key.count("*") > 3:
        return False
    try:
        re.compile(key)
    except re.error:
        return False
    return True


def base_folder_of(name: str, revision: str | None) -> Path:
    """The local folder of a backbone: itself, or the Hub snapshot that loading it has cached.

    Raises:
        UserError: the snapshot cannot be had.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_BASE_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model={name}: its files are not cached and the Hub cannot be reached ({error})") from error
