"""What every run leaves in its folder when its training is over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from adalora_dist.artifacts.export import SavedAdapter, is_adapter, save_adapter, task_settings
from adalora_dist.artifacts.formats import FORMATS, Options
from adalora_dist.backbones.dequantized import QuantizedWeight, quantization_record, quantized_weights
from adalora_dist.backbones.load import dtype_named
from adalora_dist.backbones.names import plain_model
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.publish import set_aside, write_whole, writing
from adalora_dist.io.redaction import redacted
from adalora_dist.methods.update import Update
from adalora_dist.sharding.tensors import release_gathered
from adalora_dist.tasks.padding import unwrapped
from adalora_dist.training.prepared import Prepared
from adalora_dist.training.run_folder import RunFolder


def export_trained(
    accelerator: Accelerator,
    prepared: Prepared,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
) -> dict[str, int]:
    """Write adapter/, rank_pattern.json, and what ``export_formats`` asks for. Collective.

    Returns:
        The rank of each adapted matrix, by name; empty without adapters.
    """
    model = unwrapped(prepared.model)
    release_gathered(prepared.model)
    adapters = prepared.hooks.updates()
    trained = adapters.trained
    pattern = {adapter.name: adapter.rank for adapter in adapters}
    if accelerator.is_main_process:
        quantized = write_adapters(config, model, adapters, trained, folder.path)
        names = getattr(model, "file_names", None)
        folder.write_json("rank_pattern.json", pattern)
        saved = SavedAdapter(adapters, config.model.name, loaded_revision(config, model), trained, task_settings(model))
        for name in config.export.export_formats:
            form, out = FORMATS[name], folder.path / name
            if form.is_adapter:
                plain = plain_model(model.config, saved.task)
                options = Options(None, quantized, names, plain=plain, pad=config.export.lora_pad)
            else:
                into = quantized if config.export.merge_into == "dequantized" else None
                options = Options(dtype_named(config.export.export_dtype), into, names, tokenizer=tokenizer)
            if said := form.write(saved, out, options):
                accelerator.print(redacted(f"{name}: {said}"))
    return pattern


def loaded_revision(config: RunConfig, model: Any) -> str | None:
    """The commit of the Hub that the backbone came from, which a branch may have left since; None for a folder."""
    return getattr(model.config, "_commit_hash", None) or config.model.revision


def write_adapters(
    config: RunConfig,
    model: Any,
    adapters: Sequence[Update],
    trained: Mapping[str, torch.Tensor],
    folder: Path,
) -> dict[str, QuantizedWeight] | None:
    """Write adapter/ with all that ``adalora-dist export`` needs later, and quantized.json of a quantised backbone.

    For the main process; no collective. Writes no adapter where there is none (methods head and full).

    Args:
        model: unwrapped.
        trained: what was trained in full besides, by parameter name.
        folder: of the run.

    Returns:
        What the weights of a quantised backbone stand for, as ``base_weights`` of an export; None: it is not.
    """
    if adapters:
        out, revision = folder / "adapter", loaded_revision(config, model)
        if out.exists() and not (out.is_dir() and is_adapter(out)):
            print(f"warning: {out} is not of this run: it is {set_aside(out).name} now")
        save_adapter(adapters, out, config.model.name, revision, trained, task_settings(model))
    if config.quantization.quantization == "none":
        return None
    quantized = quantized_weights(model, config)
    record = json.dumps(quantization_record(quantized), indent=2) + "\n"
    with writing(folder / "quantized.json"):
        write_whole(folder / "quantized.json", record)
    return quantized
