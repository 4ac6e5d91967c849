"""What the studies of this folder compare: the grid, runs with nothing set, low ranks, and the paper's ablations."""

from __future__ import annotations

from typing import Any

from adalora_dist.config.methods import MethodConfig, method_config, settings_of

SCALE = 2
"""alpha / init_rank, alike for all but the arms with nothing set."""
HEAD = ("task-head",)
RANK, BUDGET_RANK = 6, 4
"""Initial rank, and average final one, of the grid."""


def arm(method: str, rank: int, target_rank: float = BUDGET_RANK, **settings: Any) -> MethodConfig:
    """A method at the scale of all; ``target_rank`` where the method has one."""
    sizes = settings_of(method, {"target_rank": target_rank, "compact": False})
    return method_config(method, init_rank=rank, alpha=SCALE * rank, train_modules=HEAD, **sizes, **settings)


GRID: dict[str, MethodConfig] = {
    "adalora": arm("adalora", RANK),
    "adalora-paper": arm("adalora", RANK, start="paper"),
    "lora-4": arm("lora", BUDGET_RANK),
    "lora-6": arm("lora", RANK),
}
DEFAULTS: dict[str, MethodConfig] = {
    # Nothing is set but, for the last one, the rank of an equal final budget.
    "adalora-defaults": method_config("adalora", train_modules=HEAD),
    "lora-defaults": method_config("lora", train_modules=HEAD),
    "lora-8": method_config("lora", train_modules=HEAD, init_rank=8),
}
LOW_RANKS: dict[str, MethodConfig] = {
    "adalora-1": arm("adalora", 2, 1),
    "lora-1": arm("lora", 1),
    "adalora-2": arm("adalora", 3, 2),
    "lora-2": arm("lora", 2),
}
ABLATIONS: dict[str, MethodConfig] = {
    "adalora-sensitivity": arm("adalora", RANK, importance="sensitivity"),
    "adalora-magnitude": arm("adalora", RANK, importance="magnitude"),
    "adalora-linear": arm("adalora", RANK, budget_schedule="linear"),
    "adalora-local": arm("adalora", RANK, budget_scope="local"),
    "adalora-gamma0": arm("adalora", RANK, orthogonality=0.0),
    "adalora-gamma0.5": arm("adalora", RANK, orthogonality=0.5),
    "adalora-norm": arm("adalora", RANK, orthogonality_form="norm"),
    "adalora-after": arm("adalora", RANK, importance_order="after"),
    "adalora-from-1x": arm("adalora", BUDGET_RANK),
    "adalora-from-2x": arm("adalora", 2 * BUDGET_RANK),
    "adalora-from-3x": arm("adalora", 3 * BUDGET_RANK),
    "adalora-early": arm("adalora", RANK, initial_warmup_steps=0),
    "adalora-late": arm("adalora", RANK, initial_warmup_steps=30),
    "adalora-short-final": arm("adalora", RANK, final_steps=10),
    "adalora-long-final": arm("adalora", RANK, final_steps=50),
    "adalora-paper-after": arm("adalora", RANK, start="paper", importance_order="after"),
}
"""One setting away from ``adalora`` each; shares of t_i and t_f of the 100 steps of SST-2, where they are 10 and 30."""
STUDIES = {
    "grid": GRID,
    "defaults": DEFAULTS,
    "low_ranks": LOW_RANKS,
    "ablations": {"adalora": GRID["adalora"], **ABLATIONS},
}
