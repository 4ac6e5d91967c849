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
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from adalora_dist.config import AdapterConfig
from adalora_dist.errors import UserError
from adalora_dist.importance import element_scores, select, select_local, update_averages
from adalora_dist.inject import AdaptedMatrix, adapted_matrices
from adalora_dist.layers import SVDLinear
from adalora_dist.schedule import BudgetSchedule
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.base import ShardEngine, sum_over
from adalora_dist.spans import FACTOR_KINDS, Factor, Span, SpanLayout

_DIGEST_BITS = 20  # three numbers below 2^20: their squares add up exactly in float64 over 8192 ranks


@dataclass(frozen=True)
class Allocation:
    """One selection of triplets; tensors stay on the device until somebody reads them."""

    step: int
    budget: int
    keep: torch.Tensor
    """(num_triplets,) bool in canonical order."""


class RankAllocator:
    """Adapts the ranks of a model's :class:`SVDLinear` layers while any training loop runs.

    Use :meth:`attach` once, before or after the engine wraps model and optimizer; the loop needs no further call.
    Ask :meth:`finish` at the end: it raises if the run did not reach its budget.
    """

    def __init__(self, matrices: list[AdaptedMatrix], config: AdapterConfig, schedule: BudgetSchedule) -> None:
        self.matrices, self.config, self.schedule = matrices, config, schedule
        self._adapts = config.method == "adalora"
        self.ranks = [m.layer.init_rank for m in matrices]
        """Triplets of each matrix at the start of the run; patterns are about these, removed ones included."""
        self.step = 0
        """Training steps seen so far; the next one is the schedule's t."""
        self.num_skipped_steps = 0
        """Steps left out because a gradient somewhere was not finite."""
        self.allocations: list[Allocation] = []
        self.keep: torch.Tensor | None = None
        """(num_triplets,) bool: the triplets of the last selection; None before the first."""
        self.frozen = False
        self.compacted = any(m.layer.rank < m.layer.init_rank for m in matrices)
        """The triplets that were pruned for good have been removed from memory."""
        self._pending = False  # a selection is due and could not be made yet
        self._engine: ShardEngine | None = None
        self._firing = 0
        self._finite = True
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
            UserError: no adapters in the model, or a schedule that does not fit ``total_steps``.
        """
        matrices = adapted_matrices(model)
        if not matrices:
            raise UserError("the model has no adapters: call inject_adapters(model, config) before attach")
        num_triplets = sum(m.layer.init_rank for m in matrices)
        target = round(config.target_rank * len(matrices)) if config.target_budget is None else config.target_budget
        if config.method == "lora":
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
        if not self._finite:
            self._engine.skip_firing()
            return
        if not self._adapts:
            return
        gradients = self._engine.gradients()
        local, flat = self._layout.views(gradients, self._gradients)
        if local:
            torch._foreach_copy_(flat, local)
            if self.config.orthogonality:
                _, regulariser = self._layout.views(gradients, self._regulariser)
                torch._foreach_add_(flat, regulariser)
                torch._foreach_copy_(local, flat)
        if self._firing == self._engine.num_firings - 1 and self.config.importance_order == "before":
            self._update_importance(self._values)

    @torch.no_grad()
    def _after_firing(self) -> None:
        assert self._engine is not None
        self._firing += 1
        if self._firing < self._engine.num_firings:
            return
        self._firing = 0
        self._pending |= self._due(self.step)
        if not self._finite:
            self.num_skipped_steps += 1
        elif self._adapts:
            if self.config.importance_order == "after":
                self._update_importance(self._collect_values())
            if self._pending:
                self._allocate()
                self._mask()
            elif self.frozen and not self.compacted:
                self._mask()
        self.step += 1

    def _begin_step(self) -> None:
        """Values and regulariser of this step; agree over the shard group whether its gradients are finite."""
        assert self._engine is not None
        regularised = self._adapts and self.config.orthogonality > 0
        parts = [self._engine.nonfinite().reshape(1).to(self._gradients)]
        if self._adapts:
            self._values = self._collect_values()
        if regularised:
            parts.insert(0, self._layout.gram_partials(self._values))
        reduced = sum_over(self._engine.shard_group, torch.cat(parts))
        self._finite = bool(reduced[-1] == 0)
        if regularised and self._finite:
            self._regulariser = self._layout.orthogonality_gradient(
                self._values,
                reduced[:-1],
                self.config.orthogonality_form,
                self.config.orthogonality,
                self.keep if self.frozen and not self.compacted else None,
            )

    def _update_importance(self, values: torch.Tensor) -> None:
        if not self.frozen and self.config.importance != "magnitude":
            update_averages(
                self.sensitivity, self.uncertainty, values, self._gradients, self.config.beta1, self.config.beta2
            )

    def _due(self, step: int) -> bool:
        """A selection is due at its steps, and at any later step if the last one was missed."""
        due = self.schedule.allocates(step) or step > self.schedule.freeze_step
        return due and self._adapts and not self.frozen

    def _allocate(self) -> None:
        """Select the budget's triplets from the scores of all ranks: one reduction."""
        assert self._engine is not None
        if self.config.importance == "magnitude":
            values = self._collect_values()
            elements = torch.zeros_like(values)
            for piece in self._layout.pieces:
                if self._factors[piece.factor].kind == "lam":
                    part = slice(piece.flat_start, piece.flat_start + piece.length)
                    elements[part] = values[part].abs()
        else:
            elements = element_scores(self.config.importance, self.sensitivity, self.uncertainty)
        partials = self._layout.score_partials(elements)
        digest = self._digest()
        reduced = sum_over(
            dist.group.WORLD if dist.is_initialized() else None,
            torch.cat([partials / self._num_replicas, digest, digest * digest]),
        )
        self._compare_digests(reduced[-6:-3], reduced[-3:])
        scores, budget = reduced[:-6], self.schedule.budget(self.step)
        if self.config.budget_scope == "local":
            self.keep = select_local(scores, self.ranks, budget)
        else:
            self.keep = select(scores, budget)
        self.allocations.append(Allocation(self.step, budget, self.keep))
        self._pending = False
        self.frozen = self.step >= self.schedule.freeze_step

    def _mask(self) -> None:
        """lambda_i <- 0 for every triplet that was not selected (eq. 6). P, Q and the moments stay.

        Once the pattern is frozen, P_i <- 0 as well: then lambda_i has no gradient any more.
        """
        assert self._engine is not None and self.keep is not None
        values = self._engine.values()
        for k, (factor, span) in enumerate(zip(self._factors, self._spans, strict=True)):
            if (factor.kind == "lam" or factor.kind == "P" and self.frozen) and span.stop > span.start:
                columns = torch.arange(span.start, span.stop, device=self.keep.device) % factor.rank
                self._engine.write(k, values[k] * self.keep[factor.first_triplet + columns])

    # ------------------------------------------------------------------ set-up and small parts

    def _list_factors(self) -> None:
        """The adapter parameters as the layers have them now, in canonical order, and where each is to be found."""
        self._factors: list[Factor] = []
        self._owners: list[tuple[SVDLinear, str]] = []  # of each factor: its layer, its name there
        first = 0
        for layer in (m.layer for m in self.matrices if m.layer.rank):
            for kind, rows in zip(FACTOR_KINDS, (layer.d_out, 1, layer.d_in), strict=True):
                if self._adapts or kind != "lam":  # plain LoRA does not train lambda
                    self._factors.append(Factor(kind, rows, layer.rank, first))
                    self._owners.append((layer, kind))
            first += layer.rank

    def rebind(self, optimizer: Any) -> None:
        """The pruned triplets have been removed: go on with the parameters that the layers have now.

        Importance is not needed any more, because the pattern is frozen: its state is given up. Collective.

        Args:
            optimizer: the outermost one, as for ``select_engine``.
        """
        self.engine.retire()
        self.compacted = True
        self._list_factors()
        self._bind(optimizer)

    def _bind(self, optimizer: Any) -> None:
        """The engine has taken over the parameters: see which spans this rank holds."""
        parameters = [getattr(layer, kind) for layer, kind in self._owners]
        engine = select_engine(parameters, optimizer)
        self._spans = engine.spans()
        device = engine.values()[0].device
        spans_of_ranks: list[list[Span]] | None = None
        num_shards, world_size = 1, 1
        if dist.is_initialized():
            world_size = dist.get_world_size()
            if engine.shard_group is not None:
                num_shards = dist.get_world_size(engine.shard_group)
                spans_of_ranks = [[]] * num_shards
                dist.all_gather_object(spans_of_ranks, self._spans, group=engine.shard_group)
        self._num_replicas = world_size // num_shards
        num_matrices = 2 * sum(rank > 0 for rank in self.ranks)
        self._layout = SpanLayout(self._factors, self._spans, spans_of_ranks, device, num_matrices)
        size = self._layout.num_elements
        self._gradients = torch.zeros(size, dtype=torch.float32, device=device)
        num_scored = 0 if self.compacted else size  # importance decides nothing any more
        self.sensitivity = torch.zeros(num_scored, dtype=torch.float32, device=device)
        self.uncertainty = torch.zeros(num_scored, dtype=torch.float32, device=device)
        generator = torch.Generator().manual_seed(0)
        weights = torch.randint(1, 2**_DIGEST_BITS, (sum(self.ranks), 3), generator=generator)
        self._digest_weights = weights.to(device)
        self._engine = engine

    def _collect_values(self) -> torch.Tensor:
        """All local elements in the flat layout, float32."""
        assert self._engine is not None
        return self._layout.collect(self._engine.values(), torch.empty_like(self._gradients))

    def _digest(self) -> torch.Tensor:
        """Three numbers below 2^20 that change with any change of the current pattern, float64."""
        if self.keep is None:
            return torch.zeros(3, dtype=torch.float64, device=self._gradients.device)
        sums = (self._digest_weights * self.keep.unsqueeze(1)).sum(0)
        return (sums % 2**_DIGEST_BITS).double()

    def _compare_digests(self, sums: torch.Tensor, sums_of_squares: torch.Tensor) -> None:
        """All ranks hold the same pattern exactly if world * sum(d^2) = (sum d)^2, in integers."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        for total, squares in zip(sums.tolist(), sums_of_squares.tolist(), strict=True):
            if world_size * int(squares) != int(total) ** 2:
                raise RuntimeError(
                    f"rank patterns differ between ranks before step {self.step}: the run cannot be trusted. Likely "
                    "causes: ranks started from different adapters or seeds, or a rank changed lambda by itself"
                )

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
        layout, regularised = self._layout, self._adapts and self.config.orthogonality > 0
        return 4 * (1 + regularised * (layout.num_gram_elements + layout.num_split_row_elements))

    @property
    def bytes_per_allocation(self) -> int:
        """What this rank puts into the reduction of one allocation; 0 on one process."""
        return 8 * (sum(self.ranks) + 6) if dist.is_initialized() and dist.get_world_size() > 1 else 0

    def rank_pattern(self) -> dict[str, int]:
        """Active rank of each adapted matrix, by name. Reads from the device."""
        if self.keep is None:
            return {m.name: m.layer.rank for m in self.matrices}
        return {
            m.name: int(part.sum()) for m, part in zip(self.matrices, self.keep.cpu().split(self.ranks), strict=True)
        }

    def full_factors(self) -> list[dict[str, torch.Tensor]]:
        """P (d_out, r), lam (r,) and Qt (d_in, r) of each adapted matrix, whole, float32. Collective.

        Columns are the triplets that the layer holds (``SVDLinear.triplets``).

        Raises:
            RuntimeError: no step has been made, so it is not known yet how the parameters are sharded.
        """
        engine = self.engine
        layers = [m.layer for m in self.matrices]
        # What stands where there is nothing to gather: no columns at rank 0, lambda = 1 in plain LoRA.
        whole = {
            id(x): {"P": torch.empty(x.d_out, 0), "lam": torch.ones(x.rank), "Qt": torch.empty(x.d_in, 0)}
            for x in layers
        }
        for k, (layer, kind) in enumerate(self._owners):
            whole[id(layer)][kind] = engine.full(k).cpu()
        return [whole[id(x)] for x in layers]

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
            self.num_skipped_steps += 1
        self.step = max(self.step, num_steps)

    def finish(self) -> None:
        """End of the run: compare the final pattern over ranks and make sure that the budget was reached.

        Raises:
            RuntimeError: the budget was not reached, with the likely cause, or patterns differ between ranks.
        """
        self._finished = True
        if problem := self.problem():
            raise RuntimeError(problem)
        self.compare_patterns()

    def compare_patterns(self) -> None:
        """Make sure that all ranks hold the same pattern. Collective.

        Raises:
            RuntimeError: they do not.
        """
        digest = self._digest()
        world = dist.group.WORLD if dist.is_initialized() else None
        reduced = sum_over(world, torch.cat([digest, digest * digest]))
        self._compare_digests(reduced[:3], reduced[3:])

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
