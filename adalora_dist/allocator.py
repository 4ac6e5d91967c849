"""``RankAllocator``: the method, attached to an optimizer once.

Per training step, inside the innermost optimizer's step hooks, where gradients are reduced, unscaled and clipped on
every engine:

1. before: the orthogonality gradient is added to the local gradients, then the importance averages of the local
   elements advance;
2. after: on the schedule's steps the b best triplets of the whole model are selected and lambda of all others is
   zeroed. Between selections a zeroed lambda may grow again, so that its triplet can come back, as in the authors'
   code.

Once the pattern is frozen, the triplets that were not selected are out of everything: lambda and P are held at 0, so
that they have no gradient (nor a part in the clipping norm), and the regulariser leaves them out. ``compaction.py``
then removes them, which changes nothing but time and memory.

All of this is a constant number of operations on flat buffers, however many matrices there are, and the host waits for
none of them: a step that is left out because of a non-finite gradient is left out on the device, by the optimizer's own
kernel and by a weight of 0 for the importance averages, and what ranks say of each other's patterns is looked at one
allocation later. (Optimizers that cannot skip on the device cost one read per step; see docs/sharding.md.)

Communication beyond plain LoRA's own, in whole:

- per step, over the shard group only (nothing on one process or under DDP): one float32 sum of
  [Gram matrices | rows cut between ranks | number of non-finite gradients];
- per allocation, over all ranks: one float64 sum of [triplet scores | 6 digest numbers]. Replicas (DDP, the outer
  axis of HSDP) contribute in equal shares, so all ranks select from the same numbers whatever their local history.

No parameter and no gradient is gathered. With ``method="lora"`` there is nothing to allocate: only the non-finite
check is left.
"""

from __future__ import annotations

import atexit
import math
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from adalora_dist.agreement import agreed
from adalora_dist.config import AdapterConfig
from adalora_dist.errors import UserError
from adalora_dist.flat import FlatBuffer, SpanLayout
from adalora_dist.importance import element_scores, select, select_local, update_averages
from adalora_dist.inject import AdaptedMatrix, adapted_matrices
from adalora_dist.lambdas import LAMBDAS_NAME
from adalora_dist.pattern_digest import DelayedSums, PatternDigest
from adalora_dist.schedule import BudgetSchedule
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.base import ShardEngine, sum_over
from adalora_dist.spans import FACTORS_OF_MATRIX, Factor, FactorKind, Span

_LAMBDA_TOLERANCE = 1e-3
"""Relative to the largest lambda; replicas on equal hardware have equal bits, on unequal hardware they drift apart."""


@dataclass(frozen=True)
class Allocation:
    """One selection of triplets; tensors stay on the device until somebody reads them."""

    step: int
    budget: int
    keep: torch.Tensor
    """(num_triplets,) bool in canonical order."""
    lowest_kept_score: torch.Tensor | None = None
    """What a triplet needed to stay, float64; infinite where none stayed."""


class AllocatorState(NamedTuple):
    """Everything that an allocator has learnt; what differs between ranks is in ``averages`` alone."""

    numbers: dict[str, Any]
    """Plain numbers and lists of them, by name."""
    patterns: torch.Tensor
    """(allocations made, num_triplets) bool: every selection so far."""
    averages: list[dict[str, torch.Tensor]]
    """Per adapter parameter this rank's span of ``sensitivity`` and ``uncertainty``; empty without them."""


class RankAllocator:
    """Adapts the ranks of a model's :class:`SVDLinear` layers while any training loop runs.

    Use :meth:`attach` once, before or after the engine wraps model and optimizer; the loop needs no further call.
    Ask :meth:`finish` at the end: it raises if the run did not reach its budget.
    """

    def __init__(self, matrices: list[AdaptedMatrix], config: AdapterConfig, schedule: BudgetSchedule) -> None:
        self.matrices, self.config, self.schedule = matrices, config, schedule
        self.lambdas = matrices[0].layer.lambdas
        """Lambda of all matrices."""
        self._adapts = config.adapts_ranks
        self._regularised = self._adapts and config.orthogonality > 0
        self._compiled = config.importance_kernel == "compiled"
        self.ranks = [m.layer.init_rank for m in matrices]
        """Triplets of each matrix at the start of the run; patterns are about these, removed ones included."""
        self.step = 0
        """Training steps seen so far; the next one is the schedule's t."""
        self.allocations: list[Allocation] = []
        self.keep: torch.Tensor | None = None
        """(num_triplets,) bool: the triplets of the last selection; None before the first."""
        self.frozen = False
        self.compacted = any(m.layer.rank < m.layer.init_rank for m in matrices)
        """The triplets that were pruned for good have been removed from memory."""
        self._pending = False  # a selection is due
        self._num_missed = 0  # steps that the engine left out by itself
        self._num_skipped: torch.Tensor | None = None  # those left out here, counted on the device
        self._unread: tuple[int, DelayedSums] | None = None  # the last allocation's step and digests
        self._masks: tuple[torch.Tensor, list[torch.Tensor]] | None = None  # a pattern, and its part per masked tensor
        self._engine: ShardEngine | None = None
        self._firing = 0
        self._finished = False

        self._list_factors()

    @classmethod
    def attach(cls, model: nn.Module, optimizer: Any, config: AdapterConfig, total_steps: int) -> RankAllocator:
        """Hook a new allocator onto ``optimizer``.

        Args:
            model: holds the adapters (``inject_adapters``); may be wrapped already.
            optimizer: a torch optimizer, or anything that wraps one as ``.optimizer`` (accelerate, DeepSpeed, an
                engine of theirs). It must update the adapters.
            config: the ``adapter`` section.
            total_steps: optimizer steps of the whole run, T.

        Raises:
            UserError: no adapters in the model, a schedule that does not fit ``total_steps``, or an optimizer whose
                groups do not have the configuration's ``lora_plus_ratio``.
        """
        matrices = adapted_matrices(model)
        if not matrices:
            raise UserError("the model has no adapters: call inject_adapters(model, config) before attach")
        num_triplets = sum(m.layer.init_rank for m in matrices)
        target = round(config.target_rank * len(matrices)) if config.target_budget is None else config.target_budget
        if not config.adapts_ranks:
            target = num_triplets
        schedule = BudgetSchedule.for_run(
            total_steps=total_steps,
            initial_budget=num_triplets,
            target_budget=target,
            initial_warmup_steps=config.initial_warmup_steps,
            final_steps=config.final_steps,
            mask_interval_steps=config.mask_interval_steps,
            kind=config.budget_schedule,
        )
        allocator = cls(matrices, config, schedule)
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if config.lora_plus_ratio not in {1.0, *(group.get("lr_ratio") for group in optimizer.param_groups)}:
            raise UserError(
                f"lora_plus_ratio={config.lora_plus_ratio:g}, but the optimizer gives P and Q one learning rate: make "
                "it over parameter_groups(model, config, learning_rate) of adalora_dist.inject, or leave "
                "lora_plus_ratio at 1"
            )
        optimizer.register_step_pre_hook(lambda opt, *_: allocator._before_firing(opt))
        optimizer.register_step_post_hook(lambda *_: allocator._after_firing())
        atexit.register(_complain_at_exit, weakref.ref(allocator))
        return allocator

    # ------------------------------------------------------------------ the step, seen from the optimizer's hooks

    @torch.no_grad()
    def _before_firing(self, optimizer: torch.optim.Optimizer) -> None:
        if self._engine is None:
            self._bind(optimizer)
        assert self._engine is not None
        if getattr(optimizer, "grad_scale", None) is not None:
            raise UserError(
                f"{type(optimizer).__name__}(fused=True) unscales fp16 gradients inside its step, after this hook: "
                "with fp16 use fused=False (Trainer: optim='adamw_torch')"
            )
        if self._firing == 0:
            self._begin_step()
        if self._adapts:
            gradients = self._engine.gradients()
            if self._regularised:
                local, flat = self._layout.views(gradients, self._gradients, orthogonal=True)
                if local:
                    torch._foreach_add_(local, flat)
            if self._measures and self.config.importance_order == "after":
                self._layout.collect(gradients, self._gradients)
            elif self._measures:
                # Nothing else needs the values in this step: w becomes w g in its place.
                local, flat = self._layout.views(gradients, self._values)
                if local:
                    torch._foreach_mul_(flat, local)
            if self._firing == self._engine.num_firings - 1 and self.config.importance_order == "before":
                self._update_importance()
        self._engine.skip_firing_if(self._skip)

    @torch.no_grad()
    def _after_firing(self) -> None:
        assert self._engine is not None
        self.lambdas.release()
        self._firing += 1
        if self._firing < self._engine.num_firings:
            return
        self._firing = 0
        self._pending |= self._due(self.step)
        if self._adapts:
            if self.config.importance_order == "after" and self._measures:
                self._collect_values()
                self._values.data.mul_(self._gradients.data)
                self._update_importance()
            if self._pending:
                self._allocate()
                self._mask()
            elif self.frozen and not self.compacted:
                self._mask()
        self.step += 1

    def _begin_step(self) -> None:
        """Values and regulariser of this step; agree over the shard group whether its gradients are finite.

        Leaves the regulariser's gradient in the gradient buffer: both hooks of a firing add and overwrite its part.
        """
        assert self._engine is not None
        if self._regularised or self._measures:
            self._collect_values()
        if self._regularised:
            self._layout.gram_partials(self._values)
        self._skip.copy_(self._engine.nonfinite())
        partials = self._layout.partials if self._regularised else self._layout.partials[-1:]
        reduced = sum_over(self._engine.shard_group, partials)
        if reduced is not partials:
            partials.copy_(reduced)
        self._skip.clamp_(max=1)
        self._num_skipped = self._skip.clone() if self._num_skipped is None else self._num_skipped.add_(self._skip)
        if self._regularised:
            self._layout.orthogonality_gradient(
                self._values,
                self.config.regulariser,
                self.config.orthogonality,
                out=self._gradients,
                keep=self.keep if self.frozen and not self.compacted else None,
            )

    @property
    def _measures(self) -> bool:
        """Whether importance averages advance."""
        return self._adapts and not self.frozen and self.config.importance != "magnitude"

    def _update_importance(self) -> None:
        """Advance the averages by w g, which stands where the values were."""
        if self._measures:
            beta1, beta2 = self.config.beta1, self.config.beta2
            averages, products = (self.sensitivity, self.uncertainty), self._values.data
            update_averages(*averages, products, beta1, beta2, self._skip, self._compiled)

    def _compile(self) -> None:
        """Build the kernel of the importance averages, by a step that is left out. Collective.

        Raises:
            UserError: it cannot be built.
        """

        def attempt() -> None:
            self._skip.fill_(1)
            try:
                self._update_importance()
            except Exception as error:  # whatever compiler it is that fails
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"importance_kernel=compiled: torch.compile cannot build it ({reason}): install a C++ compiler "
                    "(CPU) or Triton (GPU), or set importance_kernel to eager"
                ) from error

        agreed(attempt, keep=False)

    def _due(self, step: int) -> bool:
        """A selection is due at its steps, and at any later step if the last one was missed."""
        due = self.schedule.allocates(step) or step > self.schedule.freeze_step
        return due and self._adapts and not self.frozen

    def _allocate(self) -> None:
        """Select the budget's triplets from the scores of all ranks: one reduction.

        If this step's gradients were not finite, importance is that of the last step that happened.
        """
        self._compare_digests()
        elements, of_values = self._gradients, self.config.importance == "magnitude"
        if of_values:
            self._collect_values()
            torch.abs(self._values.data, out=elements.data)
        else:
            element_scores(self.config.importance, self.sensitivity, self.uncertainty, out=elements.data)
        scores = self._layout.score_partials(elements, "lam" if of_values else None)
        world = dist.group.WORLD if dist.is_initialized() else None
        reduced = sum_over(world, torch.cat([scores, *self._digest.summands(self.keep)]))
        scores, digests = reduced.split([len(scores), 6])
        self._unread = self.step, DelayedSums(digests)
        budget = self.schedule.budget(self.step)
        if self.config.budget_scope == "local":
            self.keep, lowest = select_local(scores, self.ranks, budget)
        else:
            self.keep, lowest = select(scores, budget)
        self.allocations.append(Allocation(self.step, budget, self.keep, lowest))
        self._pending = False
        self.frozen = self.step >= self.schedule.freeze_step

    def _mask(self) -> None:
        """lambda_i <- 0 for every triplet that was not selected (eq. 6). P, Q and the moments stay.

        Once the pattern is frozen, P_i <- 0 as well: then lambda_i has no gradient any more.
        """
        assert self._engine is not None and self.keep is not None
        masked = self._lams + self._ps if self.frozen else self._lams
        values = [self._engine.values()[k] for k in masked]
        if self._masks is None or self._masks[0] is not self.keep:
            masks = [self.keep[slice(*self._spans[k])] for k in self._lams]
            if self.frozen:
                rows = dict(zip(self._row_cuts, self.keep.split(list(self._row_cuts.values())), strict=True))
                masks += [self._mask_of(k, rows[k], x) for k, x in zip(self._ps, values[len(masks) :], strict=True)]
            self._masks = self.keep, masks
        if masked:
            self._engine.write(masked, torch._foreach_mul(values, self._masks[1]))

    def _mask_of(self, k: int, row: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """1 or 0 for the elements of ``values``, the local span of a P: ``row`` for each row."""
        if values.ndim == 2:
            return row
        span, rank = self._spans[k], len(row)
        length = span.stop - span.start
        return row.roll(-(span.start % rank)).repeat(-(-length // rank))[:length]

    # ------------------------------------------------------------------ set-up and small parts

    def _list_factors(self) -> None:
        """The adapter parameters as the model has them now, in canonical order, and where each is to be found."""
        self._factors: list[Factor] = []
        self._owners: list[tuple[nn.Module, str]] = []  # of each factor: its module, its name there
        self.parameter_names: list[str] = []
        """In the order of spans: MATRIX.P and MATRIX.Qt of each matrix, then lambda of all."""
        first = 0
        for layer in (m.layer for m in self.matrices if m.layer.rank):
            for kind, rows in zip(FACTORS_OF_MATRIX, (layer.d_out, layer.d_in), strict=True):
                self._factors.append(Factor(kind, rows, layer.rank, first))
                self._owners.append((layer, kind))
                self.parameter_names.append(f"{layer.name}.{kind}")
            first += layer.rank
        if self._adapts:  # plain LoRA does not train lambda
            self._factors.append(Factor("lam", 1, first, 0))
            self._owners.append((self.lambdas, "lam"))
            self.parameter_names.append(LAMBDAS_NAME)

    def bind(self, optimizer: Any) -> None:
        """Before the first step, when the engine has taken over the parameters: see which spans this rank holds.

        The first step does so by itself. Collective.

        Args:
            optimizer: as the engine wraps it.
        """
        if self._engine is None:
            self._bind(optimizer)

    def rebind(self, optimizer: Any) -> None:
        """The pruned triplets have been removed: go on with the parameters that the layers have now.

        Importance is not needed any more, because the pattern is frozen: its state is given up. Collective.

        Args:
            optimizer: as the engine wraps it.
        """
        self.engine.retire()
        self.compacted = True
        self._list_factors()
        self._bind(optimizer)

    def _bind(self, optimizer: Any) -> None:
        self._set_up(select_engine([getattr(layer, kind) for layer, kind in self._owners], optimizer))

    def _set_up(self, engine: ShardEngine) -> None:
        """See which spans this rank holds; lay them out and make all buffers and views."""
        self._spans = engine.spans()
        values = engine.values()
        device = values[0].device
        spans_of_ranks: list[list[Span]] | None = None
        num_shards, world_size = 1, 1
        if dist.is_initialized():
            world_size = dist.get_world_size()
            if engine.shard_group is not None:
                num_shards = dist.get_world_size(engine.shard_group)
                spans_of_ranks = [[]] * num_shards
                dist.all_gather_object(spans_of_ranks, self._spans, group=engine.shard_group)
        num_matrices = 2 * sum(rank > 0 for rank in self.ranks)
        self._layout = SpanLayout(
            self._factors, self._spans, spans_of_ranks, device, num_matrices=num_matrices,
            num_replicas=world_size // num_shards,
        )  # fmt: skip
        self._skip = self._layout.partials[-1]  # 1 where this step has a non-finite gradient
        self._digest = PatternDigest(sum(self.ranks), device)
        if self._adapts:
            shapes = [v.shape for v in values]
            self._values = FlatBuffer(self._layout, shapes, device)
            self._gradients = FlatBuffer(self._layout, shapes, device)
            num_scored = 0 if self.compacted else len(self._values.data)  # importance decides nothing any more
            self.sensitivity = torch.zeros(num_scored, dtype=torch.float32, device=device)
            self.uncertainty = torch.zeros(num_scored, dtype=torch.float32, device=device)
        self._row_cuts = {k: f.rank for k, f in enumerate(self._factors) if f.kind == "P"}  # the triplets of each P
        self._ps = [k for k in self._row_cuts if values[k].numel()]
        # lambda, if it is trained and this rank holds a part of it
        self._lams = [k for k, f in enumerate(self._factors) if f.kind == "lam" and values[k].numel()]
        self._masks = None
        self._engine = engine
        if self._compiled and not self.compacted:
            self._compile()

    def _collect_values(self) -> None:
        """All local elements into the flat layout, float32."""
        assert self._engine is not None
        self._layout.collect(self._engine.values(), self._values)

    def _compare_digests(self) -> None:
        """Raise, on all ranks alike, if the patterns of two ranks differed at the last allocation."""
        if self._unread is not None:
            step, digests = self._unread
            self._unread = None
            if not digests.agree(dist.get_world_size() if dist.is_initialized() else 1):
                raise RuntimeError(
                    f"rank patterns differ between ranks before step {step}: the run cannot be trusted. Likely "
                    "causes: ranks started from different adapters or seeds, or a rank changed lambda by itself"
                )

    # ------------------------------------------------------------------ what a checkpoint holds

    def state(self) -> AllocatorState:
        """A copy of the allocator's state between two steps, on the CPU. :meth:`bind` comes first.

        Raises:
            RuntimeError: patterns differ between ranks: such a state must not be kept.
        """
        assert self._engine is not None
        self._compare_digests()
        numbers = {
            "step": self.step,
            "num_skipped_steps": self.num_skipped_steps,
            "pending": self._pending,
            "frozen": self.frozen,
            "allocation_steps": [a.step for a in self.allocations],
            "allocation_budgets": [a.budget for a in self.allocations],
        }
        none = torch.zeros(0, sum(self.ranks), dtype=torch.bool)
        patterns = torch.stack([a.keep.cpu() for a in self.allocations]) if self.allocations else none
        averages: list[dict[str, torch.Tensor]] = [{} for _ in self._spans]
        for name, average in self._averages().items():
            flat = FlatBuffer(self._layout)
            flat.data.copy_(average)
            pieces = [torch.empty(span.stop - span.start) for span in self._spans]
            local, views = self._layout.views(pieces, flat)
            if local:
                torch._foreach_copy_(local, views)
            for held, piece in zip(averages, pieces, strict=True):
                held[name] = piece
        return AllocatorState(numbers, patterns, averages)

    def load_state(self, state: AllocatorState) -> None:
        """Continue from ``state``, whose averages are of this rank's spans now. :meth:`bind` comes first."""
        assert self._engine is not None
        numbers = state.numbers
        self.step, self._num_missed, self._num_skipped = numbers["step"], numbers["num_skipped_steps"], None
        self._pending, self.frozen = numbers["pending"], numbers["frozen"]
        made = zip(numbers["allocation_steps"], numbers["allocation_budgets"], state.patterns, strict=True)
        self.allocations = [Allocation(step, budget, keep.to(self._skip.device)) for step, budget, keep in made]
        self.keep = self.allocations[-1].keep if self.allocations else None
        for name, average in self._averages().items():
            flat = FlatBuffer(self._layout)
            self._layout.collect([held[name] for held in state.averages], flat)
            average.copy_(flat.data)

    def _averages(self) -> dict[str, torch.Tensor]:
        """The importance averages, while they are kept."""
        if not self._adapts or self.sensitivity.numel() != self._layout.num_elements:
            return {}
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    # ------------------------------------------------------------------ what loops and reports ask

    @property
    def engine(self) -> ShardEngine:
        """What says which spans of the adapters this rank holds.

        Raises:
            RuntimeError: no step has been made, so it is not known yet.
        """
        if self._engine is None:
            raise RuntimeError("the adapters can be gathered after the first optimizer step, not before")
        return self._engine

    @property
    def budget(self) -> int:
        """Active triplets right now."""
        return self.allocations[-1].budget if self.allocations else self.schedule.initial_budget

    @property
    def bytes_per_step(self) -> int:
        """What this rank puts into the per-step reduction; 0 where nothing is sharded. Known after the first step."""
        if self._engine is None or self._engine.shard_group is None:
            return 0
        return 4 * (self._layout.partials.numel() if self._regularised else 1)

    @property
    def bytes_per_allocation(self) -> int:
        """What this rank puts into the reduction of one allocation; 0 on one process."""
        return 8 * (sum(self.ranks) + 6) if dist.is_initialized() and dist.get_world_size() > 1 else 0

    @property
    def num_skipped_steps(self) -> int:
        """Steps left out because a gradient somewhere was not finite. Reads from the device."""
        return self._num_missed + (0 if self._num_skipped is None else int(self._num_skipped))

    def rank_pattern(self) -> dict[str, int]:
        """Active rank of each adapted matrix, by name. Reads from the device."""
        if self.keep is None:
            return {m.name: m.layer.rank for m in self.matrices}
        return {
            m.name: int(part.sum()) for m, part in zip(self.matrices, self.keep.cpu().split(self.ranks), strict=True)
        }

    @torch.no_grad()
    def growth(self, rates: Sequence[float]) -> float:
        """How far the update has left 0, in units of what a LoRA's would have if its steps had no common direction.

        The mean over triplets of |lambda_i P_i Q_i|_F over sqrt(sum of rates^2) sqrt(d_out / 3): under Adam an element
        of LoRA's B moves by about the learning rate in a step, so its root mean square after steps in random directions
        is the first root, and the row of A beside it has length sqrt(1/3). Collective; reads from the device. Between
        two steps only.

        Args:
            rates: the learning rate of P in each step so far.
        """
        assert self._engine is not None
        self._collect_values()
        torch.square(self._values.data, out=self._gradients.data)
        kinds: tuple[FactorKind, ...] = ("P", "lam", "Qt")
        world = dist.group.WORLD if dist.is_initialized() else None
        partials = [self._layout.score_partials(self._gradients, kind) for kind in kinds]
        p, lam, q = sum_over(world, torch.stack(partials))  # mean squares of columns, rows, and lambda
        d_in = [m.layer.d_in for m in self.matrices for _ in range(m.layer.rank)]
        sizes = (p * lam * q * torch.tensor(d_in, device=p.device) * 3).sqrt()  # over sqrt(d_out / 3)
        return float(sizes.mean()) / math.sqrt(math.fsum(rate**2 for rate in rates))

    def full_factors(self) -> list[dict[str, torch.Tensor]]:
        """P (d_out, r), lam (r,) and Qt (d_in, r) of each adapted matrix, whole, float32. Collective.

        Columns are the triplets that the layer holds (``SVDLinear.triplets``).

        Raises:
            RuntimeError: no step has been made, so it is not known yet how the parameters are sharded.
        """
        engine = self.engine
        gathered = {(id(owner), kind): engine.full(k).cpu() for k, (owner, kind) in enumerate(self._owners)}
        layers = [m.layer for m in self.matrices]
        ranks = [layer.rank for layer in layers]
        # What stands where there is nothing to gather: lambda = 1 in plain LoRA, no columns at rank 0.
        lams = gathered.get((id(self.lambdas), "lam"), torch.ones(sum(ranks))).split(ranks)
        return [
            {
                "P": gathered.get((id(layer), "P"), torch.empty(layer.d_out, 0)),
                "lam": lam,
                "Qt": gathered.get((id(layer), "Qt"), torch.empty(layer.d_in, 0)),
            }
            for layer, lam in zip(layers, lams, strict=True)
        ]

    def catch_up(self, num_steps: int) -> None:
        """Tell the allocator that the loop counts ``num_steps`` finished steps.

        Engines that skip a step with an overflow never call the optimizer, so its schedule would fall behind. A
        selection that was due meanwhile is made at the next step that does happen.

        Raises:
            RuntimeError: no step at all has reached the allocator: it hangs on another optimizer than is stepped.
        """
        if self._engine is None and num_steps > 32:
            raise RuntimeError(
                f"{num_steps} training steps were counted, but the optimizer given to RankAllocator.attach was never "
                "stepped: attach to the optimizer that the loop (or engine) uses"
            )
        for missed in range(self.step, num_steps):
            self._pending |= self._due(missed)
            self._num_missed += 1
        self.step = max(self.step, num_steps)

    def finish(self) -> None:
        """End of the run: compare the final pattern over ranks and make sure that the budget was reached.

        Ask before anything is published.

        Raises:
            RuntimeError: the budget was not reached, with the likely cause, or patterns or lambdas differ between
                ranks, or a lambda outside of the pattern is not 0.
        """
        self._finished = True
        if problem := self.problem():
            raise RuntimeError(problem)
        self.compare_patterns()
        if self._adapts:
            self._compare_lambdas()

    def compare_patterns(self) -> None:
        """Make sure that all ranks hold the same pattern. Collective; reads from the device.

        Raises:
            RuntimeError: they do not.
        """
        self._compare_digests()
        world = dist.group.WORLD if dist.is_initialized() else None
        self._unread = self.step, DelayedSums(sum_over(world, torch.cat(self._digest.summands(self.keep))))
        self._compare_digests()

    def _compare_lambdas(self) -> None:
        """Raise, on all ranks alike, if replicas hold different lambdas, or one outside of the pattern is not 0."""
        assert self._engine is not None and self.keep is not None
        world = dist.group.WORLD if dist.is_initialized() else None
        values = self._engine.values()
        lam = torch.zeros(self._layout.num_triplets, dtype=torch.float64, device=self.keep.device)
        for k in self._lams:
            lam[slice(*self._spans[k])] = values[k].flatten()
        lam = sum_over(self._engine.shard_group, lam)  # whole, as this rank's replica has it
        mean = sum_over(world, lam.clone()) / (dist.get_world_size() if dist.is_initialized() else 1)
        differs = ~((lam - mean).abs().max() <= _LAMBDA_TOLERANCE * mean.abs().max())
        outside = differs & False if self.compacted else (lam * ~self.keep).any()
        flags = sum_over(world, torch.stack([differs, outside]).double()).tolist()
        for flag, what in zip(flags, ("differ between replicas", "outside of the pattern are not 0"), strict=True):
            if flag:
                raise RuntimeError(
                    f"lambdas {what} at the end of the run: it cannot be trusted. A rank changed lambda by itself, or "
                    "its memory is faulty"
                )

    def problem(self) -> str | None:
        """Why the run, if it ended now, would not have met its budget; None if it has."""
        if self._engine is None:
            return "the rank allocator was never called: the optimizer given to RankAllocator.attach was not stepped"
        if self._adapts and not self.frozen:
            return (
                f"the budget was not reached: {self.budget} triplets are active, the target is "
                f"{self.schedule.target_budget}; the run ended after step {self.step} of the "
                f"{self.schedule.total_steps} that the schedule was made for"
            )
        return None

    def detach(self) -> None:
        """The run was given up on purpose: no complaint at exit."""
        self._finished = True


def _complain_at_exit(reference: weakref.ref[RankAllocator]) -> None:
    """For plain loops that never ask :meth:`RankAllocator.finish`."""
    allocator = reference()
    if allocator is not None and not allocator._finished and (problem := allocator.problem()):
        print(f"warning: adalora_dist: {problem}", file=sys.stderr)
