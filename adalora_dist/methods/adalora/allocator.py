"""``RankAllocator``: what AdaLoRA does at every optimizer step.

Called by ``methods/hooks.py`` inside the innermost optimizer's step hooks, where gradients are reduced, unscaled and
clipped on every engine:

1. before: the orthogonality gradient is added to the local gradients, then the importance averages of the local
   elements advance;
2. after: on the schedule's steps the b best triplets of the whole model are selected and lambda of all others is
   zeroed. Between selections a zeroed lambda may grow again, so that its triplet can come back, as in the authors'
   code.

Once the pattern is frozen, the triplets that were not selected are out of everything: lambda and P are held at 0, so
that they have no gradient (nor a part in the clipping norm), and the regulariser leaves them out. ``compaction.py``
then removes them, which changes nothing but time and memory.

All of this is a bounded number of operations on flat buffers, however many matrices there are, and the host waits for
none of them: a step that is left out because of a non-finite gradient is left out on the device, by the optimizer's own
kernel and by a weight of 0 for the importance averages, and what ranks say of each other's patterns is looked at one
allocation later.

Communication beyond plain LoRA's own, in whole:

- per step, over the shard group only (nothing on one process or under DDP), in the hooks' sum: float32 [Gram matrices |
  rows cut between ranks];
- per allocation, over all ranks: one float64 sum of [triplet scores | 6 digest numbers | tokens of each expert, if
  scores are by token]. Replicas (DDP, the outer axis of HSDP) contribute in equal shares, so all ranks select from the
  same numbers whatever their local history.

No parameter and no gradient is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from adalora_dist.config.methods import AdaptiveConfig
from adalora_dist.methods.adalora.allocations import Allocation, records, spread, with_next
from adalora_dist.methods.adalora.bound import BoundTriplets
from adalora_dist.methods.adalora.checks import PatternWatch, compare_lambdas
from adalora_dist.methods.adalora.compaction import remove_triplets
from adalora_dist.methods.adalora.growth import growth, growth_line
from adalora_dist.methods.adalora.importance import select, select_local
from adalora_dist.methods.adalora.layers import LAMBDAS_NAME, TripletLayer, ranks_of
from adalora_dist.methods.adalora.routing import TokensSeen
from adalora_dist.methods.adalora.schedule import BudgetSchedule
from adalora_dist.methods.protocol import Step, StepState
from adalora_dist.sharding.base import ShardEngine, sum_over
from adalora_dist.sharding.spans import FACTORS_OF_MATRIX, Factor, Span


class RankAllocator(Step):
    """Adapts the ranks of a model's :class:`TripletLayer` layers while any training loop runs.

    Args:
        layers: all that the model has, in canonical order.
        config: the ``adapter`` section.
        schedule: of this run.
    """

    def __init__(self, layers: Sequence[TripletLayer], config: AdaptiveConfig, schedule: BudgetSchedule) -> None:
        super().__init__(layers)
        self.layers, self.config = list(layers), config
        self.schedule: BudgetSchedule = schedule
        self.lambdas = layers[0].lambdas
        """Lambda of all matrices."""
        self.ranks = [rank for layer in layers for rank in layer.init_ranks]
        """Triplets of each matrix at the start of the run; patterns are about these, removed ones included."""
        self.allocations: list[Allocation] = []
        self.frozen = False
        self.compacted = any(layer.rank < layer.init_rank for layer in layers)
        """The triplets that were pruned for good have been removed from memory."""
        self._pending = False  # a selection is due
        self._watch = PatternWatch()
        self._tokens = TokensSeen(layers, config)
        self._bound: BoundTriplets | None = None

    # ------------------------------------------------------------------------------------ what the engine has of it

    def parameters(self) -> dict[str, torch.Tensor]:
        """MATRIX.P and MATRIX.Qt of each matrix of rank > 0, then lambda of all: the order of spans."""
        return {**super().parameters(), LAMBDAS_NAME: self.lambdas.lam}

    def bind(self, engine: ShardEngine) -> torch.Tensor:
        factors: list[Factor] = []
        first = 0
        for layer in (layer for layer in self.layers if layer.rank):
            for kind, rows in zip(FACTORS_OF_MATRIX, (layer.d_out, layer.d_in), strict=True):
                factors.append(Factor(kind, rows, layer.rank, first, tuple(r for r in layer.ranks if r)))
            first += layer.rank
        factors.append(Factor("lam", 1, first, 0))
        self._bound = BoundTriplets(factors, engine, self.ranks, self.config, measures=not self.compacted)
        return self._bound.sums.partials if self._regularised else self._bound.sums.partials[-1:]

    @property
    def bound(self) -> BoundTriplets:
        """What lies along this rank's spans.

        Raises:
            RuntimeError: no engine has taken the parameters over yet.
        """
        if self._bound is None:
            raise RuntimeError("what a rank holds is known from the first optimizer step on, not before")
        return self._bound

    # ------------------------------------------------------------------------------------------------------ the step

    def sums(self, step: int) -> None:
        self._pending |= self._due(step)
        if self._regularised:
            self.bound.gram_partials()
        elif self._measures:
            self.bound.collect_values()

    def summed(self) -> None:
        if self._regularised:
            self.bound.regularise(self.keep if self.frozen and not self.compacted else None)

    def before(self, is_last: bool) -> None:
        gradients = self.bound.engine.gradients()
        if self._regularised or self._measures:
            self.bound.take_in(gradients, self._regularised, self._measures, is_last, self._pending)

    def after(self, step: int) -> None:
        bound = self.bound
        self.lambdas.release()
        if self.config.importance_order == "after" and self._measures:
            bound.take_in_stepped()
        if self._pending:
            self._allocate(step)
            bound.mask(self._selected, self.frozen)
        elif self.frozen and not self.compacted:
            bound.mask(self._selected, self.frozen)
        self._tokens.clear()

    def missed(self, step: int) -> None:
        """A selection that was due is made at the next step that does happen."""
        self._pending |= self._due(step)
        self._tokens.clear()

    def notice(self, step: int, learning_rate: Callable[[int], float]) -> str:
        """At t_i: how far the update has left 0, with a warning where pruning would choose by noise."""
        if step != self.schedule.initial_warmup_steps or self._bound is None:  # every step so far overflowed
            return ""
        rates = [self.config.lora_plus_ratio * learning_rate(t) for t in range(step + 1)]
        return growth_line(growth(self.bound, self.layers, rates), self.config, self.schedule)

    def replaces(self, hooks: Any, model: nn.Module, optimizer: Any) -> str:
        if self.config.compact and self.compact(hooks, model, optimizer):
            return "pattern frozen, pruned triplets removed from memory"
        return ""

    def compact(self, hooks: Any, model: nn.Module, optimizer: Any) -> bool:
        """Remove the triplets that were pruned for good; once per run, on every rank, between two steps. Collective.

        Parameters become new objects, see :func:`~adalora_dist.methods.adalora.compaction.remove_triplets`. Importance
        is not needed any more, because the pattern is frozen: its state is given up.

        Returns:
            Whether anything was done. False: the pattern is not frozen yet, was compacted before, or keeps no triplet
            at all (nothing would be left that an engine could shard).

        Raises:
            UserError: engine or optimizer cannot be rebuilt. Nothing has been changed then.
            RuntimeError: ranks disagree on the pattern.
        """
        if not self.frozen or self.compacted:
            return False
        self.compare_patterns()
        if not self._selected.any():
            return False
        outermost = remove_triplets(self.layers, self._selected, model, optimizer)
        self.compacted = True
        hooks.rebind(outermost)
        return True

    @property
    def _regularised(self) -> bool:
        return self.config.orthogonality > 0

    @property
    def _measures(self) -> bool:
        """Whether importance averages advance."""
        return not self.frozen and self.config.importance != "magnitude"

    @property
    def _selected(self) -> torch.Tensor:
        assert self.keep is not None
        return self.keep

    def _due(self, step: int) -> bool:
        """A selection is due at its steps, and at any later step if the last one was missed."""
        return not self.frozen and (self.schedule.allocates(step) or step > self.schedule.freeze_step)

    def _allocate(self, step: int) -> None:
        """Select the budget's triplets from the scores of all ranks: one reduction.

        If this step's gradients were not finite, importance is that of the last step that happened.
        """
        self._watch.compare()
        bound = self.bound
        world = dist.group.WORLD if dist.is_initialized() else None
        scores = bound.score_partials()
        counts = [tokens.to(scores.device) for tokens in self._tokens.partials()]
        reduced = sum_over(world, torch.cat([scores, *bound.digest.summands(self.keep), *counts]))
        scores, digests, *counts = reduced.split([len(scores), 6, *map(len, counts)])
        self._watch.note(step, digests)
        scores = self._tokens.weigh(scores, counts)
        budget = self.schedule.budget(step)
        if self.config.budget_scope == "local":
            self.keep, lowest = select_local(scores, self.ranks, budget)
        else:
            self.keep, lowest = select(scores, budget)
        self.allocations = with_next(self.allocations, Allocation(step, budget, self.keep, lowest, scores))
        self._pending = False
        self.frozen = step >= self.schedule.freeze_step

    # ------------------------------------------------------------------------------------ what a checkpoint holds

    def state(self, spans: Sequence[Span]) -> StepState:
        self._watch.compare()
        numbers = {
            "pending": self._pending,
            "frozen": self.frozen,
            "allocation_steps": [a.step for a in self.allocations],
            "allocation_budgets": [a.budget for a in self.allocations],
        }
        if self._tokens.smoothed:
            numbers["tokens_seen"] = list(self._tokens.smoothed)
        none = torch.zeros(0, sum(self.ranks), dtype=torch.bool)
        patterns = torch.stack([a.keep.cpu() for a in self.allocations]) if self.allocations else none
        return StepState(numbers, patterns, self.bound.averages())

    def load_state(self, state: StepState) -> None:
        numbers, device = state.numbers, self.bound.skip.device
        self._pending, self.frozen = numbers["pending"], numbers["frozen"]
        self._tokens.smoothed = list(numbers.get("tokens_seen", self._tokens.smoothed))
        made = zip(numbers["allocation_steps"], numbers["allocation_budgets"], state.patterns, strict=True)
        self.allocations = [Allocation(step, budget, keep.to(device)) for step, budget, keep in made]
        self.keep = self.allocations[-1].keep if self.allocations else None
        self.bound.load_averages(state.averages)

    # ------------------------------------------------------------------------------------------- the end of a run

    def problem(self, step: int) -> str | None:
        if self.frozen:
            return None
        return (
            f"the budget was not reached: {self.budget} triplets are active, the target is "
            f"{self.schedule.target_budget}; the run ended after step {step} of the {self.schedule.total_steps} that "
            "the schedule was made for"
        )

    def check(self) -> None:
        """Compare the final pattern and lambdas over ranks.

        Raises:
            RuntimeError: patterns or lambdas differ, or a lambda outside of the pattern is not 0.
        """
        self.compare_patterns()
        compare_lambdas(self.bound, self._selected, self.compacted)

    def compare_patterns(self) -> None:
        """Make sure that all ranks hold the same pattern. Collective; reads from the device.

        Raises:
            RuntimeError: they do not.
        """
        self._watch.compare()
        world = dist.group.WORLD if dist.is_initialized() else None
        self._watch.note(None, sum_over(world, torch.cat(self.bound.digest.summands(self.keep))))
        self._watch.compare()

    # ------------------------------------------------------------------------------------------ what reports ask

    @property
    def budget(self) -> int:
        """Active triplets right now."""
        return self.allocations[-1].budget if self.allocations else self.schedule.initial_budget

    @property
    def bytes_per_allocation(self) -> int:
        """What this rank puts into the reduction of one allocation; 0 on one process."""
        return (
            8 * (sum(self.ranks) + 6 + len(self._tokens.smoothed))
            if dist.is_initialized() and dist.get_world_size() > 1
            else 0
        )

    def rank_pattern(self) -> dict[str, int]:
        if self.keep is None:
            return ranks_of(self.layers)
        names = (name for layer in self.layers for name in layer.matrix_names())
        return {name: int(part.sum()) for name, part in zip(names, self.keep.cpu().split(self.ranks), strict=True)}

    def facts(self) -> dict[str, Any]:
        """Budgets, and the rank of each matrix at the start of the run, by name in canonical order."""
        budgets = {"initial_budget": self.schedule.initial_budget, "target_budget": self.schedule.target_budget}
        names = (name for layer in self.layers for name in layer.matrix_names())
        ranks = dict(zip(names, self.ranks, strict=True))
        return super().facts() | budgets | {"initial_ranks": ranks}

    def plan(self) -> str:
        first, last = self.schedule.initial_budget, self.schedule.target_budget
        return f"budget {first} -> {last} triplets by step {self.schedule.freeze_step + 1}"

    def record(self, step: int) -> dict[str, float]:
        """The budget after the step, whether it made an allocation, and what was found then."""
        made = [a for a in self.allocations if a.step <= step]
        ranks, budget = self.ranks, self.schedule.initial_budget
        if made:
            ranks, budget = [int(part.sum()) for part in made[-1].keep.cpu().split(self.ranks)], made[-1].budget
        found: dict[str, float] = {"budget": budget, "allocated": int(bool(made) and made[-1].step == step)}
        found |= {"mean_rank": budget / len(ranks), "min_rank": min(ranks), "max_rank": max(ranks)}
        return found | (spread(made[-1], self.ranks) if found["allocated"] else {})

    def report(self) -> dict[str, float]:
        """The budget, ranks, and how far P and Q are from what the regulariser asks for, where a step has told."""
        ranks = self.rank_pattern().values()
        found: dict[str, float] = {"budget": self.budget, "mean_rank": self.budget / len(self.ranks)}
        found |= {"min_rank": min(ranks), "max_rank": max(ranks)}
        # Of the last step: there is none before the first, nor where pruned triplets have just left.
        if self._regularised and self._bound is not None and self.bound.sums.partials[:-1].any():
            found["orthogonality"] = self.bound.sums.mean_defect(self.config.regulariser)
        return found

    def progress(self) -> str:
        ranks = list(self.rank_pattern().values())
        first, last = self.schedule.initial_budget, self.schedule.target_budget
        return (
            f"budget {self.budget:,} ({first:,} -> {last:,} triplets), rank of a matrix {min(ranks)} to {max(ranks)}, "
            f"mean {sum(ranks) / len(ranks):.1f}, "
        )

    def events(self, first: int) -> list[dict[str, Any]]:
        return records(self.allocations, self.ranks, first)

    def buffers(self) -> Iterable[torch.Tensor]:
        return () if self._bound is None else (self._bound.sensitivity, self._bound.uncertainty)
