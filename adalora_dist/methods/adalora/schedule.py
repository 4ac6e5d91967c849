"""The budget schedule b(t): how many triplets stay active at optimizer step t. Integers only.

Source: AdaLoRA (arXiv 2303.10512), eq. 12 in the continuous form of the authors' code. The printed equation has
(t - t_i - t_f) in the numerator, which jumps at both ends of the pruning phase; the code's (t - t_i) does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adalora_dist.io.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BudgetSchedule:
    """b(t) for 0-based optimizer steps t = 0 .. total_steps - 1.

    Steps before and at t_i prune nothing. Until T - t_f the budget falls from ``initial_budget`` to
    ``target_budget`` and triplets are re-selected every ``mask_interval_steps``. At T - t_f (or at the last step, if
    t_f is 0) the last selection is made, whatever the interval, and the pattern is frozen from then on.

    Raises:
        UserError: a value outside its range, or phases that leave no step to prune in.
    """

    initial_budget: int
    target_budget: int
    total_steps: int
    initial_warmup_steps: int
    final_steps: int
    mask_interval_steps: int = 1
    kind: Literal["cubic", "linear"] = "cubic"

    def __post_init__(self) -> None:
        if not 0 <= self.target_budget <= self.initial_budget:
            raise UserError(
                f"target_budget={self.target_budget} is outside 0..{self.initial_budget} (the initial budget b(0), "
                "all triplets): lower target_rank or target_budget, or raise init_rank"
            )
        if self.total_steps < 1:
            raise UserError(f"total_steps={self.total_steps} must be at least 1: train on more rows or longer")
        if self.initial_warmup_steps < 0 or self.final_steps < 0:
            raise UserError(
                f"initial_warmup_steps={self.initial_warmup_steps} and final_steps={self.final_steps} must be >= 0"
            )
        if self.initial_warmup_steps + self.final_steps >= self.total_steps:
            raise UserError(
                f"initial_warmup_steps={self.initial_warmup_steps} + final_steps={self.final_steps} must be less than "
                f"the run's {self.total_steps} optimizer steps: shorten the phases or train longer"
            )
        if self.mask_interval_steps < 1:
            raise UserError(f"mask_interval_steps={self.mask_interval_steps} must be at least 1")

    @classmethod
    def for_run(
        cls,
        *,
        total_steps: int,
        initial_budget: int,
        target_budget: int,
        initial_warmup_steps: int | None = None,
        final_steps: int | None = None,
        mask_interval_steps: int | None = None,
        kind: Literal["cubic", "linear"] = "cubic",
    ) -> BudgetSchedule:
        """A schedule whose unset phases follow from the run's length: 10 %, 30 % and 1 % of the steps."""
        return cls(
            initial_budget=initial_budget,
            target_budget=target_budget,
            total_steps=total_steps,
            initial_warmup_steps=total_steps // 10 if initial_warmup_steps is None else initial_warmup_steps,
            final_steps=total_steps * 3 // 10 if final_steps is None else final_steps,
            mask_interval_steps=max(1, total_steps // 100) if mask_interval_steps is None else mask_interval_steps,
            kind=kind,
        )

    @property
    def freeze_step(self) -> int:
        """The step of the last selection; the pattern of every later step is this one."""
        return min(self.total_steps - self.final_steps, self.total_steps - 1)

    def budget(self, step: int) -> int:
        """b(step), in triplets."""
        if step >= self.freeze_step:
            return self.target_budget
        if step <= self.initial_warmup_steps:
            return self.initial_budget
        pruning_steps = self.total_steps - self.initial_warmup_steps - self.final_steps
        remaining = 1 - (step - self.initial_warmup_steps) / pruning_steps
        if self.kind == "cubic":
            remaining **= 3
        return int(self.target_budget + (self.initial_budget - self.target_budget) * remaining)

    def allocates(self, step: int) -> bool:
        """Whether triplets are selected after optimizer step ``step``."""
        if step == self.freeze_step:
            return True
        return self.initial_warmup_steps < step < self.freeze_step and step % self.mask_interval_steps == 0

    @property
    def num_allocations(self) -> int:
        """How many selections a whole run makes; at least one."""
        return sum(self.allocates(step) for step in range(self.total_steps))
