"""Settings of GaLore (arXiv 2403.03507)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from adalora_dist.config.methods.base import MethodConfig, ModulePatterns


class GaLoreConfig(MethodConfig):
    """every weight of the model; of the gradients of many matrices a projection of low rank"""

    method: Literal["galore"] = "galore"
    train_modules: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc]  # no setting: every weight is trained anyway
    init_rank: int = Field(128, ge=1)
    """Rank r of the projection of every matrix's gradient; a matrix with a shorter side takes that."""
    targets: ModulePatterns = Field(("all-linear",), min_length=1)
    """Matrices whose gradients are projected: module names, dotted names, regular expressions, or all-linear."""
    update_scale: float = Field(0.25, gt=0)
    """alpha of the paper, by which a projected matrix's updates are multiplied beside the learning rate."""
    refresh_every_steps: int = Field(200, ge=1)
    """T: optimizer steps between two choices of the projections, each from the gradient of its step."""
    projection: Literal["std", "left", "right"] = "std"
    """Side that is projected: std the shorter one, as published; right: columns, free of traffic where rows are
    sharded; left: rows."""
    projector: Literal["auto", "exact", "randomised"] = "auto"
    """How singular vectors are found: exactly, or by randomised subspace iteration; auto: exactly up to 4096 on
    the projected side."""

    trains_backbone: ClassVar[bool] = True
