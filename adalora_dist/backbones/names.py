"""Which tensors of a model's files each of its parameters is made of: transformers' own tables, asked here only.

Files spell names in other ways than modules do: older spellings (LayerNorm.gamma), a prefix more or less (``bert.``),
modules that were moved (multimodal models), several tensors that become one (experts) or one that becomes several.
transformers renames and converts while it loads. Here the same rules go over the names in the files' headers and say,
without reading a weight, where each parameter comes from, and so under which name a trained one has to be written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adalora_dist.backbones.conversions import ConversionRules
from adalora_dist.backbones.files import Stored, stored_tensors, weight_files
from adalora_dist.backbones.parts import input_embeddings
from adalora_dist.io.errors import UserError, reason_of
from adalora_dist.io.foreign_files import read_object
from adalora_dist.sharding.tensors import full_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FileNames:
    """Where each tensor of a model lies in its files, by the tensor's name in the plain model, without adapters."""

    model_class: str
    """For messages."""
    sources: Mapping[str, tuple[Stored, ...]]
    """One tensor of the files, which it is a copy of, or for those in ``computed`` all that it is computed from. A tied
    parameter has the same under each of its names. Of two spellings in the files, the one that is loaded."""
    computed: frozenset[str]
    """What transformers converts while it loads: stacked, split, transposed, and so on."""
    missing: tuple[str, ...]
    """Parameters that loading the files leaves at random values: not in them, or in ``mismatched``."""
    mismatched: Mapping[str, tuple[int, ...]]
    """Parameters that have another shape in the files: this one."""
    unexpected: tuple[str, ...]
    """Tensors of the files for which the model has no place, by the name that they would have."""
    rules: ConversionRules | None = None
    """None where no class is known."""

    @classmethod
    def of(cls, model: PreTrainedModel, stored: Mapping[str, Stored]) -> FileNames:
        """Go over the headers as ``from_pretrained`` goes over the tensors.

        Args:
            model: plain: on the meta device or whole, neither sharded nor quantised nor adapted.
            stored: from :func:`adalora_dist.backbones.files.stored_tensors`.
        """
        from transformers.core_model_loading import dot_natural_key

        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        rules = ConversionRules(model, shapes)
        sources: dict[str, tuple[Stored, ...]] = {}
        computed, unexpected = set(), []
        for key in sorted(stored, key=dot_natural_key):  # transformers' order: of two spellings, it keeps the first
            names, is_copy = rules.names_of(key)
            for name in names:
                if name not in shapes:
                    unexpected.append(name)
                elif is_copy:
                    sources.setdefault(name, (stored[key],))
                else:
                    computed.add(name)
                    sources[name] = (*sources.get(name, ()), stored[key])
        mismatched = {
            name: source[0].shape
            for name, source in sources.items()
            if name not in computed and source[0].shape != shapes[name]
        }
        # A tied tensor is in the files once, under any of its names.
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        missing = []
        for group in aliases.values():
            owner = next((name for name in group if name in sources), None)
            if owner is None or owner in mismatched:
                missing.append(owner or group[0])
            if owner is not None:
                sources = {name: sources[owner] for name in group} | sources
                computed |= set(group) if owner in computed else set()
        buffers = {name for name, _ in model.named_buffers()}
        # What files of old have, or what the class lists.
        surplus = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ()))
        return cls(
            type(model).__name__,
            sources,
            frozenset(computed),
            # What the class leaves out of its own report is computed, such as sinusoidal positions.
            tuple(n for n in missing if not _matches(model._keys_to_ignore_on_load_missing, n)),
            mismatched,
            tuple(n for n in unexpected if n not in buffers and not _matches(surplus, n)),
            rules,
        )

    @classmethod
    def exactly(cls, stored: Mapping[str, Stored]) -> FileNames:
        """For files of which no class is known: every tensor under its own name, and nothing else."""
        return cls("the model", {key: (s,) for key, s in stored.items()}, frozenset(), (), {}, ())

    @classmethod
    def without_headers(cls, model: PreTrainedModel, report: Mapping[str, Any]) -> FileNames:
        """For weights that are pickled or packed: what ``from_pretrained`` itself reports, and no place for anything.

        Args:
            report: from ``output_loading_info=True``.
        """
        mismatched = {name: tuple(stored) for name, stored, _ in report["mismatched_keys"]}
        parameters = dict(model.named_parameters())
        missing = sorted(n for n in {*report["missing_keys"], *mismatched} if n in parameters)
        unexpected = tuple(sorted(report["unexpected_keys"]))
        return cls(type(model).__name__, {}, frozenset(), tuple(missing), mismatched, unexpected)

    def known_as(self, name: str) -> str:
        """What a parameter is called here that may have the name of a class with another head."""
        if name not in self.sources and self.rules is not None:
            [name, *_], _ = self.rules.names_of(name)
        return name

    def has(self, name: str) -> bool:
        """Whether parameter ``name`` is in the files, or made of what is in them."""
        return self.known_as(name) in self.sources

    def source_of(self, name: str) -> Stored | None:
        """The tensor of the files that parameter ``name`` is a copy of; None if it is in no file.

        A name of a class with another head, which has the backbone under a prefix or without it, counts as well.

        Raises:
            UserError: it is computed from several, or is a part of one, so that none can be replaced.
        """
        name = self.known_as(name)
        if name in self.computed:
            keys = ", ".join(source.key for source in self.sources[name][:2])
            more = f" and {n} more" if (n := len(self.sources[name]) - 2) > 0 else ""
            raise UserError(
                f"{name} of {self.model_class} is computed from other tensors of its files ({keys}{more}), so no "
                "merged model can be written: leave it out of targets and train_modules, or leave merged out of "
                "export_formats"
            )
        return self.sources[name][0] if name in self.sources else None

    def places(
        self, shapes: Mapping[str, tuple[int, ...]], whole: Collection[str], where: Path | str
    ) -> tuple[dict[str, str], list[str]]:
        """Where new values of parameters are written.

        Args:
            shapes: of each parameter that something is added to in its file.
            whole: parameters that are replaced, whatever shape the files have them in, or added.
            where: the folder of the files, for messages.

        Returns:
            Key in the files -> parameter name, and the names that are added to the files.

        Raises:
            UserError: a parameter of ``shapes`` is not there in its shape, one is no copy of a single tensor, or one
                that is added would not be found again.
        """
        places: dict[str, str] = {}
        added = []
        for name in [*shapes, *(n for n in whole if n not in shapes)]:
            source = self.source_of(name)
            if source is not None:
                if name not in whole and source.shape != shapes[name]:
                    raise UserError(
                        f"{where}: tensor {source.key} has shape {source.shape}, the run's has {shapes[name]}: merge "
                        "into the run's own base, not quantised"
                    )
                places.setdefault(source.key, name)
            elif name not in whole:
                raise UserError(
                    f"{where}: no tensor {name} in its .safetensors files: leave it out of targets, and merge into the "
                    "run's own base"
                )
            elif self.rules is None or self.rules.names_of(name) != ([name], True):
                raise UserError(
                    f"{where}: its files lack {name}, and transformers would not find it there under that name: save "
                    "the model with save_pretrained first"
                )
            else:
                added.append(name)
        return places, added


def names_in(folder: Path, task: Mapping[str, Any]) -> FileNames:
    """The names in a model's folder, for a model of which there is no more than this; arguments as plain_model.

    Of a class that transformers does not have, names count as they are.

    Raises:
        UserError: as :func:`plain_model`, or the files cannot be read.
    """
    stored = stored_tensors(weight_files(folder))
    model = plain_model(folder, task)
    return FileNames.exactly(stored) if model is None else FileNames.of(model, stored)


def plain_model(base: Path | Any, task: Mapping[str, Any]) -> PreTrainedModel | None:
    """The model of a task on the meta device, without adapters; None where transformers does not have its class.

    Such a class is code from a repository, which is not run here.

    Args:
        base: the backbone's configuration, or its folder.
        task: what the task changes in config.json; the class is its ``architectures``, or else the base's.

    Raises:
        UserError: the class cannot be built from the folder's config.json.
    """
    import transformers

    if isinstance(base, Path):
        own = read_object(base / "config.json").get("architectures")
    else:
        own = base.architectures
    names = task.get("architectures") or own or [""]
    model_class = getattr(transformers, str(names[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        return None
    try:
        is_folder = isinstance(base, Path)
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False) if is_folder else deepcopy(base)
        for key, value in task.items():
            if key != "architectures":
                setattr(config, key, {int(k): v for k, v in value.items()} if key == "id2label" else value)
        return on_meta(model_class, config)
    except Exception as error:  # anybody's config.json, and any of the classes
        raise UserError(
            f"{base}: its config.json does not describe a {names[0]} ({reason_of(error, 200)}): fetch the model again"
        ) from error


def on_meta(model_class: Any, config: Any, **options: Any) -> PreTrainedModel:
    """A model with names and shapes and no weights, also in a process that has ZeRO-3 partition every new module.

    Args:
        model_class: a class of models, or an ``AutoModelFor*``.
        options: of the latter's ``from_config``.
    """
    with _without_zero3(), torch.device("meta"):
        if hasattr(model_class, "from_config"):
            model: PreTrainedModel = model_class.from_config(deepcopy(config), **options)
        else:
            model = model_class(deepcopy(config))
    return model


@contextmanager
def _without_zero3() -> Iterator[None]:
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules outside the backbone, each with a dot: what may be new in a model for another task."""
    backbone = getattr(model, "base_model", model)
    if backbone is not model:
        return tuple(f"{name}." for name, module in model.named_children() if module is not backbone)
    # A model that is its own backbone (T5 for question answering): no stack of layers, nor what tokens enter by.
    entrance = input_embeddings(model)
    inside = {id(entrance)} | {id(p) for p in (entrance.parameters() if entrance is not None else ())}
    return tuple(
        f"{name}."
        for name, module in model.named_children()
        if not any(isinstance(m, nn.ModuleList) or id(m) in inside for m in module.modules())
        and not any(id(p) in inside for p in module.parameters())
    )


def new_backbone_modules(model: nn.Module) -> list[str]:
    """Modules at the end of the backbone that its files do not initialise: a pooler, say; [] where nothing is known.

    Whatever lacks a layer of a stack, its embeddings or a norm is no such model, but an incomplete one.
    """
    names: FileNames | None = getattr(model, "file_names", None)
    backbone = getattr(model, "base_model", model)
    prefix = next((name for name, module in model.named_children() if module is backbone), None)
    if names is None or prefix is None:
        return []
    missing = set(names.missing)
    found = []
    for child, module in backbone.named_children():
        parameters = dict(module.named_parameters(prefix=f"{prefix}.{child}"))
        has_matrix = any(len(full_shape(p)) > 1 for p in parameters.values())
        is_part = any(isinstance(m, nn.ModuleList | nn.Embedding) for m in module.modules())
        if has_matrix and not is_part and parameters.keys() <= missing:
            found.append(f"{prefix}.{child}")
    return found


def layers_left_out(model: nn.Module) -> list[str]:
    """Layers of the files behind the last that the model has: of a config.json with fewer, or for drafts of tokens."""
    names: FileNames | None = getattr(model, "file_names", None)
    stacks = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    found: dict[str, None] = {}
    for name in () if names is None else names.unexpected:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            if int(number[0]) >= stacks.get(name[: number.start() - 1], math.inf):
                found[name[: number.end()]] = None
    return list(found)


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
