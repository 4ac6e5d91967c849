"""Settings of VeRA (arXiv 2310.11454), and of DVoRA, which is DoRA with VeRA's update (arXiv 2402.09353)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from adalora_dist.config.methods.base import TargetsConfig
from adalora_dist.config.methods.dora import refuse_int8


class SharedConfig(TargetsConfig):
    """One whose matrices share two random projections."""

    init_rank: int = Field(256, ge=1)
    """Rank r of the random projections that all matrices share."""
    d_initial: float = Field(0.1, gt=0)
    """Start of the vectors between the two projections."""
    projection_seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the projections (PEFT's projection_prng_key)."""

    compiles: ClassVar[bool] = False


class VeraConfig(SharedConfig):
    """two vectors per matrix, around random projections that all matrices share"""

    method: Literal["vera"] = "vera"

    formats: ClassVar[frozenset[str]] = frozenset({"merged", "lora", "peft"})


class DvoraConfig(SharedConfig):
    """vera's vectors for directions, and the length of every row of the weights"""

    method: Literal["dvora"] = "dvora"

    def check(self, run: Any) -> None:
        super().check(run)
        refuse_int8(self.method, run)
