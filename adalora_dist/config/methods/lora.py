"""Settings of LoRA (arXiv 2106.09685)."""

from __future__ import annotations

from typing import Literal

from adalora_dist.config.methods.base import LowRankConfig


class LoraConfig(LowRankConfig):
    """low-rank adapters that all have, and keep, rank init_rank"""

    method: Literal["lora"] = "lora"
