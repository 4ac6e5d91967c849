"""What a run can be exported as, by name; ``artifacts/formats.py`` has the writers. Never imports torch."""

from __future__ import annotations

from typing import Literal

ExportFormat = Literal["merged", "lora", "peft"]

EXPORT_FORMATS: dict[ExportFormat, str] = {
    "merged": "a whole model",
    "lora": "plain LoRA for PEFT and vLLM",
    "peft": "PEFT's own form of the method (AdaLoRA, DoRA, VeRA, prefix)",
}
"""Each with what it is."""

ADAPTER_FORMATS: tuple[ExportFormat, ...] = ("lora", "peft")
"""Those that are put on the base model, and so need a method with adapters."""
