"""Tied weights that the files have under both names, as others' merged models do.

transformers ties them where they are equal, and else goes by the files, whatever config.json says. It compares what it
has loaded, which is nothing on meta (FSDP2) and parts of no shape under ZeRO-3; so they are compared in the files here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from safetensors import safe_open

from adalora_dist.backbones.files import Stored
from adalora_dist.backbones.names import FileNames
from adalora_dist.io.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KeptTwice(NamedTuple):
    """Two parameters that the model's class ties."""

    name: str
    owner: str
    """Whose tensor both are, if they are tied."""
    are_equal: bool
    """In the files."""


def kept_twice(model: PreTrainedModel, names: FileNames) -> Iterator[KeptTwice]:
    """All such pairs; reads both tensors of each."""
    for name, owner in model.all_tied_weights_keys.items():
        pair = [names.sources[key][0] for key in (name, owner) if key in names.sources and key not in names.computed]
        if len(pair) == 2 and pair[0] != pair[1]:
            yield KeptTwice(name, owner, torch.equal(*map(_stored, pair)))


def tie_equals(model: PreTrainedModel, names: FileNames) -> None:
    """Tie what ``from_pretrained`` would have tied, had it not built the model on meta."""
    for name, owner, are_equal in list(kept_twice(model, names)):
        if are_equal:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, model.get_parameter(owner))


def refuse_unequal(model: PreTrainedModel, names: FileNames, where: str) -> None:
    """Raise where ``from_pretrained`` under ZeRO-3 would tie what differs.

    Raises:
        UserError: two tensors that are to be tied differ in the files.
    """
    for name, owner, are_equal in kept_twice(model, names):
        if not are_equal:
            raise UserError(
                f"model={where!r}: its config.json ties {name} to {owner}, and its files have another {name}, which "
                "ZeRO-3 would lose: set tie_word_embeddings to false there, or use FSDP2"
            )


def _stored(source: Stored) -> torch.Tensor:
    """As it lies in the file, which is mapped."""
    with safe_open(source.file, framework="pt") as opened:
        return cast(torch.Tensor, opened.get_tensor(source.key))
