"""The forms in which a run can be exported: who writes them, and how they are used. Names: ``config/formats.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from adalora_dist.artifacts.export import BaseWeight, SavedAdapter, base_folder_of, merge
from adalora_dist.artifacts.peft_format import save_adalora, save_lora, vllm_options
from adalora_dist.config.formats import ExportFormat

Write = Callable[[SavedAdapter, Path, torch.dtype | None, Mapping[str, BaseWeight] | None], None]


@dataclass(frozen=True)
class Format:
    """One of them."""

    write: Write
    """(what was trained, folder, dtype, base_weights). The folder must not exist. dtype None: as the base's files, or
    float32 for adapters; base_weights as of :func:`adalora_dist.artifacts.export.merge`, for whole models alone."""
    is_adapter: bool
    """PEFT puts it on the base model; else it is a whole model, which transformers loads."""
    vllm_options: Callable[[Path], str] | None = None
    """Where vLLM serves it as an adapter of a causal model: the options for its folder, or why it does not."""


def _write_merged(
    saved: SavedAdapter, folder: Path, dtype: torch.dtype | None, base_weights: Mapping[str, BaseWeight] | None
) -> None:
    base = base_folder_of(saved.base_model, saved.base_revision)
    merge(saved.adapters, base, folder, dtype, saved.trained, base_weights, saved.task)


def _write_adapter(
    save: Callable[..., None],
    saved: SavedAdapter,
    folder: Path,
    dtype: torch.dtype | None,
    base_weights: Mapping[str, BaseWeight] | None,
) -> None:
    save(saved.adapters, folder, saved.base_model, saved.base_revision, dtype or torch.float32, saved.trained)


FORMATS: dict[ExportFormat, Format] = {
    "merged": Format(_write_merged, is_adapter=False),
    "lora": Format(partial(_write_adapter, save_lora), is_adapter=True, vllm_options=vllm_options),
    "peft": Format(partial(_write_adapter, save_adalora), is_adapter=True),
}
