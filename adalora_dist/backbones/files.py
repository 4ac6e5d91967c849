"""Where a backbone lies on disk: its folder, and the weight files in it and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import MAX_BYTES, check_plain, check_tensors, read_object

_BASE_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]  # weights, configurations, tokenizers
_SETTINGS = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}
"""What transformers takes for an object without a look."""
_MOST = {("layer", "layers"): 10_000, ("experts",): 1 << 16, ("size", "dim", "d_model"): 1 << 24}
"""Of what a configuration may have, by the ends of its names: building a model takes time for each layer."""
_AT_LEAST_1 = ("hidden_size", "d_model", "num_hidden_layers", "n_layer")


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


def locate_weights(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a model folder or of a model on the Hub, fetched if need be; [] if it has none.

    Raises:
        UserError: the folder has weights in other forms alone, lacks a file of its index, or a link leads nowhere.
        OSError: the Hub cannot be reached.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    if (folder := Path(name)).is_dir():
        for path in folder.iterdir():
            if path.suffix in (".safetensors", ".json") and path.is_symlink() and not path.exists():
                raise UserError(f"{path} is a link to nothing: fetch the model again, or put the file itself there")
        return weight_files(folder)
    quiet = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if single := cached_file(name, "model.safetensors", **quiet):
        return [Path(single)]
    if not (index := cached_file(name, "model.safetensors.index.json", **quiet)):
        return []
    indexed_files(Path(index))
    return [Path(file) for file in get_checkpoint_shard_files(name, index, revision=revision)[0]]


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


class Stored(NamedTuple):
    """A tensor of a safetensors file."""

    file: Path
    key: str
    shape: tuple[int, ...]


def stored_tensors(shards: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of some safetensors files by its name there, from their headers.

    Raises:
        UserError: a file is missing or cut off.
    """
    found: dict[str, Stored] = {}
    for shard in shards:
        check_tensors(shard, "fetch the model again")
        try:
            with safe_open(shard, framework="pt") as file:
                found |= {k: Stored(shard, k, tuple(file.get_slice(k).get_shape())) for k in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{shard} is not a whole safetensors file ({error}): fetch the model again") from error
    return found


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


def refuse_odd_files(folder: Path) -> None:
    """Raise if a file that transformers would read from a model's folder is none, or without end.

    Raises:
        UserError: a pipe, a device, a folder of a file's name, words and settings of more than any model has, or
            settings that are no JSON object.
    """
    for path in sorted(folder.iterdir()):
        if any(path.match(pattern) for pattern in _BASE_FILES) and path.exists():
            check_plain(path, None if path.suffix == ".safetensors" else MAX_BYTES)
            if path.name in _SETTINGS:
                read_object(path)


def refuse_odd_sizes(name: str, config: Mapping[Any, Any]) -> None:
    """Raise if a model of such a configuration could not be built, not even without weights: its modules are too many.

    Args:
        name: of the model, for the error.
        config: what ``to_dict`` of a configuration gives, with those of its parts in it.

    Raises:
        UserError: more layers or experts, or a wider matrix, than any model has; no layer, or a width of nothing.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_odd_sizes(name, value)
        if not isinstance(key, str) or not isinstance(value, int) or isinstance(value, bool):
            continue
        most = next((most for ends, most in _MOST.items() if key.endswith(ends)), value)
        least = 1 if key in _AT_LEAST_1 else value
        if not least <= value <= most:
            legal = f"{least:,} to {most:,}" if key in _AT_LEAST_1 else f"at most {most:,}"
            raise UserError(
                f"model={name!r}: {key} in its config.json is {value:,}, must be {legal}: give a folder that "
                "save_pretrained wrote"
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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_BASE_FILES))
    except HFValidationError as error:
        raise UserError(f"model={name} is neither a folder that exists nor a name on the Hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model={name}: its files are not cached and the Hub cannot be reached ({error})") from error
