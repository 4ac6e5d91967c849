"""What every recipe leaves in its run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from adalora_dist.artifacts.export import base_folder_of, merge, save_adapter, save_trained, task_settings
from adalora_dist.artifacts.peft_check import not_verified
from adalora_dist.artifacts.peft_format import save_adalora, save_lora
from adalora_dist.backbones.dequantized import QuantizedWeight, describe, quantized_weights
from adalora_dist.backbones.load import dtype_named
from adalora_dist.backbones.names import plain_model
from adalora_dist.config.sections import RunConfig
from adalora_dist.methods.adalora.method import gather_adapters
from adalora_dist.methods.update import AdapterWeights
from adalora_dist.training.prepared import Prepared
from adalora_dist.training.run_folder import RunFolder
from adalora_dist.training.trained import gather_trained


def export_run(
    accelerator: Accelerator,
    prepared: Prepared,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
) -> dict[str, int]:
    """Write adapter/, what ``export_formats`` asks for, and rank_pattern.json. Collective.

    Returns:
        The rank of each adapted matrix, by name; empty without adapters.
    """
    model = accelerator.unwrap_model(prepared.model)
    adapters = gather_adapters(prepared.allocator) if prepared.allocator else []
    trained = gather_trained(accelerator, prepared.model)
    pattern = {adapter.name: adapter.lam.numel() for adapter in adapters}
    if accelerator.is_main_process:
        base_weights = write_adapters(config, model, adapters, trained, folder.path)
        folder.write_json("rank_pattern.json", pattern)
        if "merged" in config.export.export_formats:
            base = base_folder_of(config.model.name, loaded_revision(config, model))
            merged, dtype = folder.path / "merged", dtype_named(config.export.export_dtype)
            names = getattr(model, "file_names", None)
            merge(adapters, base, merged, dtype, trained, base_weights, task_settings(model), names=names)
            tokenizer.save_pretrained(merged)
    return pattern


def loaded_revision(config: RunConfig, model: Any) -> str | None:
    """The commit of the Hub that the backbone came from, which a branch may have left since; None for a folder."""
    return getattr(model.config, "_commit_hash", None) or config.model.revision


def write_adapters(
    config: RunConfig,
    model: Any,
    adapters: Sequence[AdapterWeights],
    trained: Mapping[str, torch.Tensor],
    folder: Path,
) -> dict[str, QuantizedWeight] | None:
    """Write adapter/ with all that ``adalora-dist export`` needs later, and lora/ and peft/ if they are asked for.

    For the main process; no collective. Writes no adapter where there is none (methods head and full).

    Args:
        model: unwrapped.
        trained: from ``gather_trained``.
        folder: of the run.

    Returns:
        ``base_weights`` for :func:`adalora_dist.artifacts.export.merge`.
    """
    name, revision = config.model.name, loaded_revision(config, model)
    settings = task_settings(model)
    if adapters:
        save_adapter(adapters, folder / "adapter", name, revision)
        save_trained(trained, folder / "adapter")
        task = json.dumps(settings, indent=2) + "\n"
        (folder / "adapter" / "task.json").write_text(task, encoding="utf-8")
    if forms := [form for form in ("lora", "peft") if form in config.export.export_formats]:
        plain = plain_model(model.config, settings)
        if "lora" in forms:
            pad = config.export.lora_pad
            save_lora(adapters, folder / "lora", name, revision, trained=trained, model=plain, pad=pad)
        if "peft" in forms:
            save_adalora(adapters, folder / "peft", name, revision, trained=trained, model=plain)
        if reason := not_verified(plain):
            print(f"{', '.join(forms)}: {reason}")
    if config.quantization.quantization == "none":
        return None
    quantized = quantized_weights(model, config)
    (folder / "quantized.json").write_text(json.dumps(describe(quantized), indent=2) + "\n", encoding="utf-8")
    return quantized if config.export.merge_into == "dequantized" else None
