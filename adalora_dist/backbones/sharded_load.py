"""Load a backbone under FSDP2 so that no process ever holds it.

Every process builds the model on the meta device (shapes, no memory). Adapters get their real values as always, the
engine shards what is there, and then each process reads its own rows of every tensor from the safetensors files:
in memory it has its share of the backbone, and of the files it touches the pages with its rows.

Under ZeRO-3 transformers' own loading does the like: every module is partitioned as soon as it has been built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from torch import nn

from adalora_dist.backbones.expert_files import ExpertPart, parts_of
from adalora_dist.backbones.experts import stacks_of
from adalora_dist.backbones.files import Stored
from adalora_dist.backbones.names import FileNames
from adalora_dist.backbones.rearranged import Rearranged
from adalora_dist.backbones.ties import tie_equals
from adalora_dist.io.errors import UserError
from adalora_dist.sharding.tensors import first_row, is_whole, local_part, whole_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Moved(NamedTuple):
    """What a parameter is among the tensors of the files that loading rearranges."""

    tensors: Rearranged
    name: str


Source = Stored | list[ExpertPart] | Moved
"""The tensor that a parameter is a copy of, what a stack of experts is made of, or where the numbers lie."""
Sources = dict[str, Source]
"""Of a module, by the name that a parameter has in it."""


def load_on_meta(auto_class: Any, name: str, names: FileNames, **options: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained(name, **options)`` with its parameters on the meta device, still to be read.

    Buffers, and parameters that the files do not have (a new classifier), are real and have the values that
    ``from_pretrained`` would give them.

    Args:
        names: of this model in its files.

    Raises:
        UserError: the model has tensors that transformers computes from others while it loads, and not by moving
            numbers alone.
    """
    model: PreTrainedModel = auto_class.from_pretrained(name, device_map="meta", **options)
    tie_equals(model, names)
    stacks: Sources = {stack.name: parts_of(names, stack) for stack in stacks_of(model) if stack.name in names.computed}
    made = {**stacks, **{other: _moved(names, other, name) for other in sorted(names.computed - stacks.keys())}}
    to_read: list[tuple[torch.Tensor, Source]] = []
    new = set(names.missing)
    for path, module in model.named_modules():
        # On the module, because names change when adapters are put around it, and parameters when it is sharded.
        known: Sources = {}
        module.weights_on_disk = known
        prefix = f"{path}." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False):
            if (full := prefix + leaf) in names.sources and full not in new:
                known[leaf] = made.get(full, names.sources[full][0])
            else:
                _allocate(parameter, "cpu")
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, torch.empty_like(buffer, device="cpu"))
            if source := names.sources.get(prefix + leaf):
                to_read.append((getattr(module, leaf), source[0]))
        module._is_hf_initialized = False
    model.initialize_weights()  # leaves out what from_pretrained has marked as loaded: all that is on meta
    _read(to_read)
    # One process that loads everything and sends it round is what this replaces.
    AcceleratorState().fsdp_plugin.cpu_ram_efficient_loading = False
    return model


def _moved(names: FileNames, name: str, model: str) -> Moved:
    try:
        return Moved(Rearranged(names, name), name)
    except UserError as error:
        raise UserError(
            f"model={model!r}: {name} is computed from other tensors of its files, which is not possible in parts "
            "under FSDP2: use ZeRO-3 (launch/accelerate/zero3.yaml)"
        ) from error


def read_trained_modules(model: nn.Module) -> None:
    """Read the backbone's trained parameters (``train_modules``) whole. Does nothing for a model that is not on meta.

    Call it before the optimizer is built: accelerate finds an optimizer's parameters again by their addresses.
    """
    to_read: list[tuple[torch.Tensor, Source]] = []
    for module in model.modules():
        if not hasattr(module, "weights_on_disk"):  # an adapter, or a model that was loaded in another way
            continue
        sources = cast(Sources, module.weights_on_disk)
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.is_meta:
                _allocate(parameter, "cpu")
                to_read.append((parameter, sources[leaf]))
    _read(to_read)


def whole_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a module that no optimizer has taken over yet, as its files have it, whole; read if it is on meta.

    On meta where it is nowhere else either. Collective where it is sharded.
    """
    weight = cast(torch.Tensor, module.weight)
    if not weight.is_meta or not hasattr(module, "weights_on_disk"):
        return whole_tensor(weight)
    read = torch.empty(weight.shape, dtype=weight.dtype)
    _read([(read, cast(Sources, module.weights_on_disk)["weight"])])
    return read


def read_shards(model: nn.Module) -> None:
    """Read this process's rows of every parameter that is on meta. Does nothing if there is none."""
    to_read: list[tuple[torch.Tensor, Source]] = []
    # fully_shard has put the adapters where it wants parameters: on the device, or on the CPU if they are offloaded.
    device = next((local_part(p).device for p in model.parameters() if not (p.is_meta or is_whole(p))), "cpu")
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                _allocate(parameter, device)
                to_read.append((parameter, cast(Sources, module.weights_on_disk)[leaf]))
    _read(to_read)


def _pieces(tensor: torch.Tensor, source: Stored | list[ExpertPart]) -> Iterator[tuple[torch.Tensor, Stored]]:
    """What is to be filled from which tensor of the files; of a stack of experts, what this process holds of each."""
    if isinstance(source, Stored):
        yield tensor, source
        return
    local, first = local_part(tensor), first_row(tensor)
    for part in source:
        if part.expert is None:
            yield tensor.transpose(1, 2) if part.is_turned else tensor, part.stored
        elif first <= part.expert < first + len(local):
            yield local[part.expert - first, part.start : part.stop], part.stored


def _allocate(parameter: nn.Parameter, device: torch.device | str) -> None:
    """Memory for a parameter on meta (if sharded, for this process's share), uninitialised. Ties and owners stay."""
    real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, real)


@torch.no_grad()
def _read(tensors: Iterable[tuple[torch.Tensor, Source]]) -> None:
    """Fill each tensor, or this process's rows of it, from the files."""
    pieces: list[tuple[torch.Tensor, Stored]] = []
    for tensor, source in tensors:
        if isinstance(source, Moved):  # all that is moved together at a time, whole: rows of one lie anywhere in it
            _copy_rows(tensor, source.tensors.read(source.name))
        else:
            pieces += _pieces(tensor, source)
    for file, entries in groupby(sorted(pieces, key=lambda entry: entry[1]), key=lambda entry: entry[1].file):
        with safe_open(file, framework="pt") as opened:
            for tensor, stored in entries:
                _copy_rows(tensor, opened.get_slice(stored.key))


def _copy_rows(tensor: torch.Tensor, whole: Any) -> None:
    """Into a tensor, or this process's rows of it, from a whole one, or the slice of a file."""
    if is_whole(tensor):
        tensor.copy_(whole[...])
    elif (local := local_part(tensor)).numel():
        first = first_row(tensor)
        local.copy_(whole[first : first + local.shape[0]])
