"""Load a backbone under FSDP2 so that no process ever holds it.

Every process builds the model on the meta device (shapes, no memory). Adapters get their real values as always, the
engine shards what is there, and then each process reads its own rows of every tensor from the safetensors files:
in memory it has its share of the backbone, and of the files it touches the pages with its rows.

Under ZeRO-3 transformers' own loading does the like: every module is partitioned as soon as it has been built.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from torch import nn

from adalora_dist.backbones.files import indexed_files
from adalora_dist.io.errors import UserError
from adalora_dist.sharding.tensors import first_row, is_whole, local_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Source(NamedTuple):
    """Where a tensor lies on disk."""

    file: Path
    key: str


def load_on_meta(auto_class: Any, name: str, **options: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained(name, **options)`` with its parameters on the meta device, still to be read.

    Buffers, and parameters that the files do not have (a new classifier), are real and have the values that
    ``from_pretrained`` would give them.

    Raises:
        UserError: the files have tensors that the model's modules do not, or tensors that transformers computes from
            several others while it loads.
    """
    model, report = auto_class.from_pretrained(name, device_map="meta", output_loading_info=True, **options)
    modules = dict(model.named_modules())
    # Tensors of modules that the model does not have are another task's head; these are not.
    if strange := sorted(key for key in report["unexpected_keys"] if key.rpartition(".")[0] in modules):
        raise UserError(
            f"model={name!r}: its files have {len(strange)} tensors that {type(model).__name__} has no place for "
            f"({', '.join(strange[:3])}): its config.json belongs to other weights; use the right one"
        )
    sources = _find_sources(model, name, options)
    to_read = []
    for path, module in modules.items():
        # On the module, because names change when adapters are put around it, and parameters when it is sharded.
        known: dict[str, _Source] = {}
        module.weights_on_disk = known  # type: ignore[assignment]
        prefix = f"{path}." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False):
            if source := sources.get(prefix + leaf):
                known[leaf] = source
            else:
                _allocate(parameter, "cpu")
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, torch.empty_like(buffer, device="cpu"))
            if source := sources.get(prefix + leaf):
                to_read.append((getattr(module, leaf), source))
        module._is_hf_initialized = False
    model.initialize_weights()  # leaves out what from_pretrained has marked as loaded: all that is on meta
    _read(to_read)
    # One process that loads everything and sends it round is what this replaces.
    AcceleratorState().fsdp_plugin.cpu_ram_efficient_loading = False
    return model


def read_trained_modules(model: nn.Module) -> None:
    """Read the backbone's trained parameters (``train_modules``) whole. Does nothing for a model that is not on meta.

    Call it before the optimizer is built: accelerate finds an optimizer's parameters again by their addresses.

    Raises:
        UserError: a parameter that the files do not have is not trained either.
    """
    to_read, random = [], []
    for path, module in model.named_modules():
        if not hasattr(module, "weights_on_disk"):  # an adapter, or a model that was loaded in another way
            continue
        sources = cast(dict[str, _Source], module.weights_on_disk)
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf not in sources and not parameter.requires_grad:
                random.append(f"{path}.{leaf}")
            elif parameter.requires_grad and parameter.is_meta:
                _allocate(parameter, "cpu")
                to_read.append((parameter, sources[leaf]))
    if random:
        raise UserError(
            f"the backbone's files lack {len(random)} frozen parameters ({', '.join(random[:3])}), which would stay "
            "random: add their modules to train_modules, or use files that have them"
        )
    _read(to_read)


def read_shards(model: nn.Module) -> None:
    """Read this process's rows of every parameter that is on meta. Does nothing if there is none."""
    to_read = []
    # fully_shard has put the adapters where it wants parameters: on the device, or on the CPU if they are offloaded.
    device = next((local_part(p).device for p in model.parameters() if not (p.is_meta or is_whole(p))), "cpu")
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                _allocate(parameter, device)
                to_read.append((parameter, cast(dict[str, _Source], module.weights_on_disk)[leaf]))
    _read(to_read)


def _allocate(parameter: nn.Parameter, device: torch.device | str) -> None:
    """Memory for a parameter on meta (if sharded, for this process's share), uninitialised. Ties and owners stay."""
    real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, real)


@torch.no_grad()
def _read(tensors: Iterable[tuple[torch.Tensor, _Source]]) -> None:
    """Fill each tensor, or this process's rows of it, from its file."""
    for file, entries in groupby(sorted(tensors, key=lambda entry: entry[1]), key=lambda entry: entry[1].file):
        with safe_open(file, framework="pt") as opened:
            for tensor, source in entries:
                stored = opened.get_slice(source.key)
                if is_whole(tensor):
                    tensor.copy_(stored[...])
                elif (local := local_part(tensor)).numel():
                    first = first_row(tensor)
                    local.copy_(stored[first : first + local.shape[0]])


def _find_sources(model: PreTrainedModel, name: str, options: dict[str, Any]) -> dict[str, _Source]:
    """Where each tensor of ``model`` lies, by its name there; transformers renames old spellings and prefixes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.utils import cached_file

    where = {k: options[k] for k in ("revision",) if k in options}
    path = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False, **where)
    if path is not None:
        with safe_open(path, framework="pt") as opened:
            files = dict.fromkeys(opened.keys(), Path(path))
    else:
        index = Path(cast(str, cached_file(name, "model.safetensors.index.json", **where)))
        files = indexed_files(index)

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    tensors = model.state_dict()
    sources = {}
    for key, file in files.items():
        renamed, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, tensors)
        if converter is not None and renamed in tensors:
            raise UserError(
                f"model={name!r}: {renamed} is computed from several tensors of its files, which is not possible row "
                "by row under FSDP2: use ZeRO-3 (launch/accelerate/zero3.yaml)"
            )
        sources[renamed if renamed in tensors else key] = _Source(file, key)
    # The files have a tied tensor once, under any of its names.
    owner: dict[int, str] = {}
    names = [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)]
    for parameter_name, identity in names:
        if parameter_name in sources:
            owner.setdefault(identity, parameter_name)
    return sources | {n: sources[owner[identity]] for n, identity in names if identity in owner}
