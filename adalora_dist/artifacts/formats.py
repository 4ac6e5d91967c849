"""The forms in which a run can be exported: who writes them, and how they are used. Names: ``config/formats.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from adalora_dist.artifacts.base_weights import BaseWeight, of_base
from adalora_dist.artifacts.export import SavedAdapter, base_folder_of, merge
from adalora_dist.artifacts.peft_check import not_verified
from adalora_dist.artifacts.peft_format import save_adalora, save_dora, save_lora, save_prefix, save_vera, vllm_options
from adalora_dist.backbones.names import FileNames, names_in, plain_model
from adalora_dist.config.formats import ExportFormat
from adalora_dist.io.errors import UserError
from adalora_dist.methods.dora import DoraUpdate
from adalora_dist.methods.hydra import HydraUpdate
from adalora_dist.methods.prefix import PrefixUpdate
from adalora_dist.methods.update import AdapterWeights, Update
from adalora_dist.methods.vera import VeraUpdate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Options:
    """How an export is to be written; each form reads what is about it."""

    dtype: torch.dtype | None = None
    """None: as the base's files, or float32 for adapters."""
    base_weights: Mapping[str, BaseWeight] | None = None
    """As of :func:`adalora_dist.artifacts.export.merge`: what a whole model, or a norm of rows, is made from."""
    names: FileNames | None = None
    """Of the trained model in the base's files; None: found out."""
    plain: PreTrainedModel | None = None
    """The base without weights, which adapters are verified on; None: made from its config.json."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """For whole models; None: the base's files."""
    pad: bool = False
    """LoRA: one rank and one alpha for all matrices, by adding zeros."""


Write = Callable[[SavedAdapter, Path, Options], str]


@dataclass(frozen=True)
class Format:
    """One of them."""

    write: Write
    """(what was trained, folder, options) -> what to say of it; "": nothing. The folder must not exist."""
    is_adapter: bool
    """PEFT puts it on the base model; else it is a whole model, which transformers loads."""
    vllm_options: Callable[[Path], str] | None = None
    """Where vLLM serves it as an adapter of a causal model: the options for its folder, or why it does not."""


def _write_merged(saved: SavedAdapter, folder: Path, options: Options) -> str:
    base = base_folder_of(saved.base_model, saved.base_revision)
    merge(
        saved.adapters, base, folder, options.dtype, saved.trained, options.base_weights, saved.task,
        names=options.names, tokenizer=options.tokenizer,
    )  # fmt: skip
    return ""


def _write_adapter(
    save: Callable[..., None], adapters: Sequence[Update], saved: SavedAdapter, folder: Path, options: Options
) -> str:
    plain = options.plain or _plain_base(saved)
    dtype = options.dtype or torch.float32
    save(adapters, folder, saved.base_model, saved.base_revision, dtype, saved.trained, plain)
    return not_verified(plain)


def _write_lora(saved: SavedAdapter, folder: Path, options: Options) -> str:
    return _write_adapter(partial(save_lora, pad=options.pad), as_lora(saved, options), saved, folder, options)


def _write_peft(saved: SavedAdapter, folder: Path, options: Options) -> str:
    """Whichever form PEFT has of the method."""
    method = saved.adapters[0].method
    if method not in _PEFT_FORMS:
        raise UserError(f"{folder}: PEFT has no form of method {method}: export the merged model")
    return _PEFT_FORMS[method](saved, folder, options)


def _write_with(save: Callable[..., None], saved: SavedAdapter, folder: Path, options: Options) -> str:
    """Of updates as they are."""
    return _write_adapter(save, saved.adapters, saved, folder, options)


def _write_dora(saved: SavedAdapter, folder: Path, options: Options) -> str:
    lengths = of_base(
        saved.adapters, *_base_files(saved, options), lambda _, weight: torch.linalg.vector_norm(weight, dim=1)
    )
    return _write_adapter(partial(save_dora, lengths=lengths), saved.adapters, saved, folder, options)


def _base_files(saved: SavedAdapter, options: Options) -> tuple[Path, FileNames, Mapping[str, BaseWeight] | None]:
    base = base_folder_of(saved.base_model, saved.base_revision)
    return base, options.names or names_in(base, saved.task), options.base_weights


def as_lora(saved: SavedAdapter, options: Options) -> list[AdapterWeights]:
    """What was trained as plain LoRA of the same function.

    Raises:
        UserError: the method's updates are no sums of low rank.
    """
    if saved.adapters and saved.adapters[0].method == HydraUpdate.method:
        return _hydra_as_lora(cast(Sequence[HydraUpdate], saved.adapters), *_base_files(saved, options))
    found = [adapter.as_lora() for adapter in saved.adapters]
    for adapter, lora in zip(saved.adapters, found, strict=True):
        if lora is None:
            raise UserError(
                f"the update of {adapter.name} ({adapter.formula}) is of full rank, no plain LoRA: export the merged "
                "model, or PEFT's own form"
            )
    return [lora for lora in found if lora is not None]


def _hydra_as_lora(
    adapters: Sequence[HydraUpdate],
    folder: Path,
    names: FileNames,
    base_weights: Mapping[str, BaseWeight] | None,
) -> list[AdapterWeights]:
    """Its sequential branch reads W0 x, so its A is made of W0."""
    for adapter in adapters:
        if names.has(f"{adapter.name}.bias"):
            raise UserError(HydraUpdate.no_lora(adapter.name))
    read = of_base(adapters, folder, names, base_weights, lambda adapter, weight: adapter.V @ weight)
    return [adapter.lora_with(read[adapter.name]) for adapter in adapters]


def _plain_base(saved: SavedAdapter) -> PreTrainedModel | None:
    """The base model without weights, from its config.json alone; None where that cannot be had."""
    from transformers import AutoConfig

    source: Any = Path(saved.base_model)
    if not source.is_dir():
        try:
            source = AutoConfig.from_pretrained(saved.base_model, revision=saved.base_revision, trust_remote_code=False)
        except (OSError, ValueError):  # not here and no network, or code from a repository
            return None
    return plain_model(source, saved.task)


_PEFT_FORMS: dict[str, Write] = {
    AdapterWeights.method: partial(_write_with, save_adalora),
    DoraUpdate.method: _write_dora,
    VeraUpdate.method: partial(_write_with, save_vera),
    PrefixUpdate.method: partial(_write_with, save_prefix),
}
"""By what the method's updates say."""
FORMATS: dict[ExportFormat, Format] = {
    "merged": Format(_write_merged, is_adapter=False),
    "lora": Format(_write_lora, is_adapter=True, vllm_options=vllm_options),
    "peft": Format(_write_peft, is_adapter=True),
}
