"""Settings of BitFit (arXiv 2106.10199)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from adalora_dist.config.methods.base import ModulePatterns, SizedConfig


class BitFitConfig(SizedConfig):
    """the biases of the model, in place"""

    method: Literal["bitfit"] = "bitfit"
    bias_modules: ModulePatterns = Field(("all",), min_length=1)
    """Modules of the backbone whose biases are trained, by name (query), or all."""
    train_norms: bool = False
    """Train the weights of normalisation layers, too: a model without biases has nothing else to train here."""

    trains_backbone: ClassVar[bool] = True
