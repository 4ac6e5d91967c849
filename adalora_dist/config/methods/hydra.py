"""Settings of Hydra (arXiv 2309.06922)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from adalora_dist.config.methods.base import TargetsConfig


class HydraConfig(TargetsConfig):
    """two low-rank branches per matrix: one beside it, as LoRA's, and one that reads what it gives"""

    method: Literal["hydra"] = "hydra"
    init_rank: int = Field(4, ge=1)
    """Rank of the parallel branch."""
    sequential_rank: int = Field(8, ge=1)
    """Rank of the sequential branch."""

    sized_by: ClassVar[tuple[str, ...]] = ("init_rank", "sequential_rank")
    formats: ClassVar[frozenset[str]] = frozenset({"merged", "lora"})
    formats_from_files: ClassVar[frozenset[str]] = formats
