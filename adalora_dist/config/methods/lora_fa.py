"""Settings of LoRA-FA (arXiv 2308.03303)."""

from __future__ import annotations

from typing import ClassVar, Literal

from adalora_dist.config.methods.base import ScaledConfig


class LoraFaConfig(ScaledConfig):
    """LoRA whose A is drawn once and frozen, so that no input has to be kept for it"""

    method: Literal["lora_fa"] = "lora_fa"
    projected: bool = False
    """Multiply the gradient of B by (A A^T)^-1 / s^2 before AdamW, so that a step follows full fine-tuning's best."""

    compiles: ClassVar[bool] = False
    formats: ClassVar[frozenset[str]] = frozenset({"merged", "lora", "peft"})
