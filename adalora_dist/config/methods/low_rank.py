"""Settings of weights that are products of low rank from the start (Kamalakara et al., arXiv 2209.13569)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from adalora_dist.config.methods.base import MethodConfig, ModulePatterns


class FactorisedConfig(MethodConfig):
    """two factors of low rank in the place of each of many matrices, and all other weights; for pre-training"""

    method: Literal["low_rank"] = "low_rank"
    train_modules: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc]  # no setting: every weight is trained anyway
    init_rank: int = Field(128, ge=1)
    """Rank r of the product in the place of every target; a matrix with a shorter side takes that."""
    targets: ModulePatterns = Field(("all-linear",), min_length=1)
    """Matrices to replace: module names, dotted names, regular expressions, or all-linear."""

    has_adapters: ClassVar[bool] = True
    trains_backbone: ClassVar[bool] = True
