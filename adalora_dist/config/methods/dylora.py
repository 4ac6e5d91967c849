"""Settings of DyLoRA (arXiv 2210.07558)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from adalora_dist.config.methods.base import TargetsConfig


class DyloraConfig(TargetsConfig):
    """LoRA at all ranks up to init_rank at once: every step trains another, and the run is exported at any of them"""

    method: Literal["dylora"] = "dylora"
    init_rank: int = Field(8, ge=1)
    """Largest rank, at which the model is evaluated and exported; adalora-dist export can give a smaller one."""
    min_rank: int = Field(1, ge=1)
    """Smallest rank that is trained, at most init_rank."""
    alpha: float = Field(16.0, gt=0)
    """At rank b the branch is scaled by alpha / b; with budget, the largest by alpha / 8."""
    frozen: Literal["no", "algorithm", "authors"] = "no"
    """Train of the ranks up to the drawn b only b's own row and column. algorithm: all others stand still, as the paper
    says; authors: they get no gradient, but AdamW's momentum and weight decay move them, as in the authors' code."""

    formats: ClassVar[frozenset[str]] = frozenset({"merged", "lora"})

    @model_validator(mode="after")
    def _ranks(self) -> DyloraConfig:
        if self.min_rank > self.init_rank:
            raise ValueError(
                f"min_rank {self.min_rank} with init_rank {self.init_rank}: the smallest rank must be at most the "
                "largest; lower min_rank or raise init_rank"
            )
        return self
