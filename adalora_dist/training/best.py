"""The best model of a run's evaluations: what checkpoints say of it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt

BEST = "best"
"""Folder of a run for its best model, as a checkpoint, and for those that kept checkpoints call the best one."""

LOWER_IS_BETTER = ("loss", "perplexity", "rmse")
"""Of all other scores, the higher one is the better."""


class Best(BaseModel):
    """The best model so far."""

    model_config = ConfigDict(extra="forbid")

    metric: str
    score: FiniteFloat
    step: NonNegativeInt
    """Optimizer steps that it has made."""
    num_since: NonNegativeInt
    """Evaluations after it, none of which was better."""

    def is_beaten_by(self, score: float) -> bool:
        """Whether a model with this score would be better; NaN never is."""
        return score < self.score if self.metric.rpartition(" ")[2] in LOWER_IS_BETTER else score > self.score
