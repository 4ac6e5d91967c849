"""The weight files of a backbone's folder, and nothing outside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from adalora_dist.errors import UserError


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: those of its index, else model.safetensors, else none.

    A folder may hold others, such as the consolidated.safetensors that some publishers put beside them.

    Raises:
        UserError: as :func:`indexed_files`.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(indexed_files(index).values()))
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def indexed_files(index: Path) -> dict[str, Path]:
    """The file of each tensor by the tensor's name, from a ``model.safetensors.index.json``.

    Files are read from, and merged models written to, the names that an index gives; and indexes come from anywhere.

    Raises:
        UserError: it is no index, or names a file that is not a plain .safetensors name in the index's own folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors files ({error}): fetch the model again") from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", name):
            raise UserError(
                f"{index} names the file {name!r:.80}: must be a plain name such as "
                "model-00001-of-00002.safetensors, in the same folder; do not use this model"
            )
    return {key: index.with_name(name) for key, name in weight_map.items()}
