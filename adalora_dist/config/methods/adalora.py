"""Settings of AdaLoRA (arXiv 2303.10512), and of whichever method adapts ranks as it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from adalora_dist.config.methods.base import LowRankConfig, TripletConfig
from adalora_dist.config.methods.peft_fields import settings_from_peft

Start = Literal["matched", "paper"]
Form = Literal["directions", "norm", "squared"]

_FORM_OF: dict[Start, Form] = {"matched": "directions", "paper": "norm"}
"""``orthogonality_form``, where it is left to ``start``."""


class AdaptiveConfig(TripletConfig):
    """One whose ranks adapt to a budget."""

    target_rank: float = Field(8.0, ge=0)
    """Average final rank, at most init_rank; the final budget is round(target_rank x number of adapted matrices)."""
    target_budget: int | None = Field(None, ge=0)
    """Final budget b(T) in triplets over all matrices; overrides target_rank."""
    start: Start = "matched"
    """matched: LoRA's own start (P = 0, Q as its A, lambda = 1), so that updates grow as LoRA's do; paper: as
    published, P and Q random and lambda = 0, which learns slowly below learning rates of about 3e-3."""
    init: Literal["gaussian", "orthonormal"] | None = None
    """P and Q with start paper: N(0, 0.02^2) as the authors (default), or std 1/sqrt(d)."""
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
    """Remove pruned triplets from memory once the pattern is frozen; false: keep them, at 0, to the end."""
    orthogonality: float = Field(0.1, ge=0)
    """gamma: coefficient of the orthogonality regulariser; 0 turns it off."""
    orthogonality_form: Form | None = None
    """directions: of the angles between columns alone (default with start matched); norm: mean of Frobenius norms, the
    authors' code and published gammas (default with start paper); squared: eq. 4 as printed."""

    adapts_ranks: ClassVar[bool] = True
    sized_by: ClassVar[tuple[str, ...]] = ("init_rank", "target_rank", "target_budget")

    @classmethod
    def resolved(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        follows: dict[str, str] = {"orthogonality_form": _FORM_OF[settings["start"]]}
        if settings["start"] == "paper":
            follows["init"] = "gaussian"
        return {name: follows.get(name) if value is None else value for name, value in settings.items()}

    @property
    def regulariser(self) -> Form:
        """``orthogonality_form``, or what follows from ``start``."""
        return self.orthogonality_form or _FORM_OF[self.start]

    @model_validator(mode="after")
    def _init_is_read(self) -> Self:
        if self.init is not None and self.start == "matched":
            raise ValueError(
                f"init {self.init} with start matched: that start has P = 0 and LoRA's Q, so init would not be read; "
                "leave init out, or set start to paper"
            )
        return self

    @model_validator(mode="after")
    def _averages_are_read(self) -> Self:
        unread: tuple[str, ...] = ()
        if self.importance == "magnitude":
            unread, why = ("beta1", "beta2", "importance_order", "importance_kernel"), "|lambda| is not averaged"
        elif self.importance == "sensitivity":
            unread, why = ("beta2",), "the uncertainty is not read"
        for name in unread:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"{name} {value} with importance {self.importance}: {why}; set {name} to its default, {default}, "
                    "or importance to sensitivity_uncertainty"
                )
        return self

    def check(self, run: Any) -> None:
        """The budget can be reached, and there are steps in which to reach it."""
        super().check(run)
        if self.target_budget is None and self.target_rank > self.init_rank:
            raise ValueError(
                f"target_rank {self.target_rank:g} with init_rank {self.init_rank}: ranks only shrink, so "
                "target_rank must be <= init_rank; lower target_rank or raise init_rank (the paper starts at 1.5 x the "
                "target)"
            )
        name = "target_rank" if self.target_budget is None else "target_budget"
        if getattr(self, name) == 0 and not self.train_modules:
            raise ValueError(
                f"{name} 0 with no train_modules: the run would end with no trained parameter left, must be > 0; "
                f"set {name} to at least 1"
            )
        total = run.train.max_steps
        given = {"initial_warmup_steps": self.initial_warmup_steps, "final_steps": self.final_steps}
        known = {name: steps for name, steps in given.items() if steps is not None}
        if total is not None and sum(known.values()) >= total:
            names = " + ".join(f"{name} {steps}" for name, steps in known.items())
            raise ValueError(
                f"{names} with max_steps {total}: no step is left in which to prune; the sum must be < max_steps, "
                f"so lower {' or '.join(known)}, or raise max_steps"
            )


class AdaLoraConfig(AdaptiveConfig, LowRankConfig):
    """low-rank adapters whose ranks adapt to one budget"""

    method: Literal["adalora"] = "adalora"
    expert_scores: Literal["per_step", "per_token"] = "per_step"
    """Scores of experts: as gradients are, sums over an expert's tokens; or divided by its share of tokens, so that
    experts that are rarely chosen are compared by what a token of theirs teaches."""

    @classmethod
    def from_peft(cls, peft_config: Any, **settings: Any) -> AdaLoraConfig:
        """What a ``peft.AdaLoraConfig`` asks for, in one line; docs/trainer.md has the table of its fields.

        It is PEFT's method: the published start and regulariser, importance of the weights after the step. A
        ``peft.LoraConfig`` is taken with a budget (``target_rank=...``), and is the start matched.

        Args:
            settings: of this class, which count instead of those that follow: ``start="matched"``, ``targets=...``.
                An ``init_rank`` keeps the scale, by another alpha, unless alpha is given, too.

        Raises:
            UserError: another configuration, or fields that are not honoured and change what is learnt.
        """
        return cls(**settings_from_peft(peft_config, settings))

    @model_validator(mode="after")
    def _scores_have_tokens(self) -> AdaLoraConfig:
        if self.expert_scores == "per_token" and self.importance == "magnitude":
            raise ValueError(
                "expert_scores per_token with importance magnitude: |lambda| does not grow with tokens, so there is "
                "nothing to divide; leave expert_scores out, or set importance to sensitivity_uncertainty"
            )
        return self
