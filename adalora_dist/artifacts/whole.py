"""Whether the files of an export can be read, all of them: before they get their name, and before they are pushed."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import check_tensors, read_bytes, read_object, read_text

if TYPE_CHECKING:
    import torch

MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Names and patterns that loading a model looks for: what a push adds, and what it removes of an earlier push."""


def apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, none in another's memory, as tied embeddings are: a file has each by itself."""
    memory: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in memory else tensor.contiguous()
        memory.add(found[name].data_ptr())
    return found


def is_model_file(name: str) -> bool:
    """Whether loading a model could pick up a file of this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def check_files(paths: Iterable[Path]) -> dict[str, set[str]]:
    """Read weights (their headers), JSON and texts as those who load them will; needs no torch.

    Returns:
        The names of the tensors in each .safetensors file, by the file's name.

    Raises:
        UserError: a file is cut off, is of another kind than its name says, or says nothing.
    """
    stored: dict[str, set[str]] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            check_tensors(path, "export again")
            try:
                with safe_open(path, framework="np") as file:
                    stored[path.name] = set(file.keys())
            except (SafetensorError, OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{path} is not a whole safetensors file ({reason}): export again") from None
        elif path.suffix == ".json":
            content = read_object(path)
            if path.name == "tokenizer.json" and not isinstance(content.get("model"), dict):
                raise UserError(
                    f"{path} holds no tokenizer (it has no model): bring it back from the base, export again"
                )
        elif path.suffix in (".txt", ".jinja"):
            read_text(path)
        elif not read_bytes(path):
            raise UserError(f"{path} is empty: bring it back from the base, or remove it")
    return stored


def check_whole(folder: Path, weights: Mapping[str, Collection[str]]) -> None:
    """Raise unless an export that has just been written can be read, and has the tensors that were to be written.

    Args:
        weights: names of the tensors by the name of the file.

    Raises:
        UserError: as :func:`check_files`, or a tensor is missing.
    """
    stored = check_files(path for path in sorted(folder.iterdir()) if is_model_file(path.name) or path.name in weights)
    for name, tensors in weights.items():
        if stored.get(name) != set(tensors):
            raise UserError(f"{folder / name} has not come to the disk as it was written: export again to another disk")
