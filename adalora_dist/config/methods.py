"""What is trained: the settings of the methods."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from adalora_dist.config.section import Section


class AdapterConfig(Section):
    method: Literal["adalora", "lora", "head", "full"] = "adalora"
    """What is trained besides train_modules: adapters whose ranks adapt to the budget; plain LoRA of rank init_rank;
    nothing (head); every weight of the model (full)."""
    init_rank: int = Field(12, ge=1)
    """Rank r of every adapted matrix at the start."""
    target_rank: float = Field(8.0, ge=0)
    """Average final rank, at most init_rank; the final budget is round(target_rank x number of adapted matrices)."""
    target_budget: int | None = Field(None, ge=0)
    """Final budget b(T) in triplets over all matrices; overrides target_rank."""
    alpha: float = Field(16.0, gt=0)
    """The branch is scaled by alpha / init_rank for the whole run."""
    targets: tuple[str, ...] = Field(("all-linear",), min_length=1)
    """Matrices to adapt: module names (q_proj), dotted names, regular expressions, or all-linear."""
    train_modules: tuple[str, ...] = ()
    """Modules trained in full besides the adapters, by name; task-head: all that lies outside the backbone."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the adapter branch (the paper uses 0)."""
    init: Literal["gaussian", "orthonormal"] = "gaussian"
    """P and Q at the start: N(0, 0.02^2) as the authors, or std 1/sqrt(d); lambda is 0 either way."""
    init_from: str | None = Field(None, min_length=1)
    """Folder of a LoRA or AdaLoRA adapter of PEFT whose update the adapters start with, instead of 0."""
    initial_warmup_steps: int | None = Field(None, ge=0)
    """t_i: optimizer steps before the first pruning; default: 10 % of the run."""
    final_steps: int | None = Field(None, ge=0)
    """t_f: optimizer steps at the end with a frozen pattern; default: 30 % of the run."""
    mask_interval_steps: int | None = Field(None, ge=1)
    """Delta T: optimizer steps between allocations; default: 1 % of the run, at least 1."""
    budget_schedule: Literal["cubic", "linear"] = "cubic"
    """How the budget falls between t_i and T - t_f."""
    budget_scope: Literal["global", "local"] = "global"
    """global: matrices compete for one budget; local: every matrix gets an equal share (ablation)."""
    importance: Literal["sensitivity_uncertainty", "sensitivity", "magnitude"] = "sensitivity_uncertainty"
    """Triplet score: smoothed sensitivity x uncertainty (the paper), sensitivity alone, or |lambda|."""
    beta1: float = Field(0.85, ge=0, lt=1)
    """Smoothing of the sensitivity; 0 uses each step's raw |w g|."""
    beta2: float = Field(0.85, ge=0, lt=1)
    """Smoothing of the uncertainty."""
    importance_order: Literal["before", "after"] = "before"
    """Weights in |w g|: before the optimizer step (Algorithm 1) or after it (the authors' code)."""
    importance_kernel: Literal["eager", "compiled"] = "eager"
    """How the averages advance: in six operations, or in one kernel, equal up to rounding, which torch.compile builds
    at the first step, in seconds, with a C++ compiler on a CPU and Triton on a GPU."""
    compact: bool = True
    """Remove pruned triplets from memory once the pattern is frozen; false: keep them, at 0, to the end.

    For the recipes' loop; HF Trainer keeps them (AdaLoraCallback)."""
    orthogonality: float = Field(0.1, ge=0)
    """gamma: coefficient of the orthogonality regulariser; 0 turns it off."""
    orthogonality_form: Literal["norm", "squared"] = "norm"
    """norm: mean of Frobenius norms (authors' code; published gammas); squared: eq. 4 as printed."""

    # What the rest asks of a method; only inject.py, which builds it, goes by its name.
    @property
    def has_adapters(self) -> bool:
        return self.method in ("adalora", "lora")

    @property
    def adapts_ranks(self) -> bool:
        """Whether there is a budget that falls."""
        return self.method == "adalora"

    @field_validator("targets", "train_modules")
    @classmethod
    def _regular_expressions(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression ({error}): correct or escape it") from None
        return patterns
