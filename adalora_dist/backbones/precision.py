"""The type that a run computes in on this machine."""

from __future__ import annotations

import os

import torch


def computed_in(precision: str) -> str:
    """fp32, bf16 or fp16, as asked for; auto: bf16 on a GPU that computes in it, fp32 elsewhere."""
    if precision != "auto":
        return precision
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) and not on_cpu
    return "bf16" if has_bf16 else "fp32"
