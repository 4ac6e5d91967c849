"""What GaLore does at every optimizer step: it puts the projected Adam direction in the place of the gradient.

The optimizer (``optimizer.py``) then takes a plain step along it, so that master weights, working copies and what is
sent round afterwards are the engine's affair, as ever. P is whole on every rank. On the right side a rank keeps
averages of the rows that it touches; on the left side R is a sum over rows, so its averages are whole on every rank.

Communication beyond the hooks' own, over the shard group (nothing on one process or under DDP), in float32:

- every firing of every step: one sum of r numbers for each row that is cut between ranks (ZeRO alone) and r n for each
  matrix that is projected on the left; none at all under FSDP2 with the right side;
- every refresh, matrix by matrix: exact and right n^2 in float64, exact and left m n, randomised n (r + 8) four times
  and on the left m r; m r or n r more for P, and on the right n for each cut row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from adalora_dist.config.methods.galore import GaLoreConfig
from adalora_dist.methods.galore.projection import (
    Side,
    adam_direction,
    gram,
    is_exact,
    leading,
    left_of,
    project,
    project_back,
    randomised_right,
    side_of,
)
from adalora_dist.methods.galore.rows import Rows, cut_rows
from adalora_dist.methods.protocol import Kept, Step, StepState
from adalora_dist.sharding.base import (
    ShardEngine,
    Span,
    agree_on,
    assemble,
    is_first_of_group,
    spans_of_ranks,
    sum_over,
)

BETAS, EPS = (0.9, 0.999), 1e-8
"""Adam's, of all that is trained."""
_SEED = 20240306


class Matrix(NamedTuple):
    """One projected matrix as this rank has it."""

    name: str
    rows: Rows
    side: Side
    p: torch.Tensor
    """(n, r) on the right, (m, r) on the left; whole on every rank, 0 before the first refresh."""
    average: torch.Tensor
    squares: torch.Tensor
    """Of R: of the rows that are touched (rows, r), or whole (r, n)."""

    @property
    def num_summed(self) -> int:
        """Numbers that a step sums over ranks where the matrix is sharded."""
        return len(self.rows.cut) * self.p.shape[1] if self.side == "right" else self.average.numel()


class GaLoreStep(Step):
    """Projections, and Adam's averages of what they leave.

    Args:
        config: the method's settings.
        seed: of the randomised iteration.
    """

    def __init__(self, config: GaLoreConfig) -> None:
        super().__init__([])
        self.config = config
        self._modules: dict[str, nn.Module] = {}
        self._matrices: list[Matrix] = []
        self._step = 0
        self._last_period = -1  # the period of T steps in which P was last chosen
        self._begun = False  # whether this step has had its first firing

    def look_at(self, model: nn.Module) -> None:
        self._modules = projected_modules(model)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": module.weight for name, module in self._modules.items()}  # type: ignore[misc]

    def bind(self, engine: ShardEngine) -> torch.Tensor:
        vector = super().bind(engine)
        self._engine, self._skip = engine, vector[-1]
        self._num_steps = torch.zeros((), dtype=torch.float32, device=vector.device)
        shapes = [(int(shape[0]), int(shape[1])) for shape in engine.shapes()]
        self._matrices = []
        own = 0 if engine.shard_group is None else dist.get_rank(engine.shard_group)
        for name, shape, spans in zip(self._modules, shapes, zip(*spans_of_ranks(engine), strict=True), strict=True):
            side, rank = side_of(shape, self.config.projection), min(self.config.init_rank, *shape)
            rows = Rows(shape, spans[own], cut_rows(shape, spans))
            m, n = shape
            reduced = (rows.stop - rows.first, rank) if side == "right" else (rank, n)
            p, average, squares = (
                torch.zeros(size, dtype=torch.float32, device=vector.device)
                for size in ((n if side == "right" else m, rank), reduced, reduced)
            )
            self._matrices.append(Matrix(name, rows, side, p, average, squares))
        return vector

    # ------------------------------------------------------------------------------------------------------- the step

    def sums(self, step: int) -> None:
        self._step, self._begun = step, False

    def before(self, is_last: bool) -> None:
        if not self._begun:
            self._begun = True
            self._num_steps += 1 - self._skip
            # The host looks at the flag only where it chooses P. A step that is left out leaves that to the next one.
            period = self._step // self.config.refresh_every_steps
            self._refreshes = period != self._last_period and not self._skip.item()
            self._last_period = period if self._refreshes else self._last_period
        firing = [
            (matrix, local)
            for matrix, local in zip(self._matrices, self._engine.gradients(), strict=True)
            if local is not None
        ]
        if self._refreshes:
            for matrix, local in firing:
                matrix.p.copy_(self._chosen(matrix, local))
        blocks = [matrix.rows.block(local) for matrix, local in firing]
        reduced = [self._reduced(matrix, block) for (matrix, _), block in zip(firing, blocks, strict=True)]
        self._sum([matrix for matrix, _ in firing], reduced)
        for (matrix, local), r in zip(firing, reduced, strict=True):
            direction = adam_direction(r, matrix.average, matrix.squares, self._num_steps, self._skip, BETAS, EPS)
            p = matrix.p if matrix.side == "right" else matrix.p[matrix.rows.first : matrix.rows.stop]
            update = project_back(direction, p, matrix.side).mul_(self.config.update_scale)
            local.copy_(matrix.rows.part(update).view(local.shape))

    @staticmethod
    def _reduced(matrix: Matrix, block: torch.Tensor) -> torch.Tensor:
        """R as far as this rank knows it."""
        p = matrix.p if matrix.side == "right" else matrix.p[matrix.rows.first : matrix.rows.stop]
        return project(block, p, matrix.side)

    def _sum(self, matrices: list[Matrix], reduced: list[torch.Tensor]) -> None:
        """Complete R of all matrices of a firing, in place, with one sum over the shard group."""
        sizes = [matrix.num_summed for matrix in matrices]
        if self._engine.shard_group is None or not sum(sizes):
            return
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self._num_steps.device)
        views = flat.split(sizes)
        for matrix, r, view in zip(matrices, reduced, views, strict=True):
            if matrix.side == "left":
                view.copy_(r.flatten())
            elif own := matrix.rows.own_cut:
                places, slots = map(list, zip(*own, strict=True))
                view.view(-1, r.shape[1])[slots] = r[places]
        views = sum_over(self._engine.shard_group, flat).split(sizes)
        for matrix, r, view in zip(matrices, reduced, views, strict=True):
            if matrix.side == "left":
                r.copy_(view.view_as(r))
            elif own := matrix.rows.own_cut:
                places, slots = map(list, zip(*own, strict=True))
                r[places] = view.view(-1, r.shape[1])[slots]

    # ---------------------------------------------------------------------------------------------------- the refresh

    def _chosen(self, matrix: Matrix, local: torch.Tensor) -> torch.Tensor:
        """P of the gradient of which this rank has ``local``; the same bits on every rank of the shard group."""
        (m, n), rank, group = matrix.rows.shape, matrix.p.shape[1], self._engine.shard_group
        exact = is_exact(self.config.projector, (m, n), matrix.side)
        index = self._matrices.index(matrix)
        if exact and matrix.side == "left":
            gradient = assemble(local.reshape(-1), matrix.rows.span, torch.Size((m, n)), group)
            return self._from_one_rank(matrix, lambda: leading(gram(gradient, "left"), rank))
        block = self._whole_rows(matrix, local)
        if exact:
            total = sum_over(group, gram(block, "right"))
            return self._from_one_rank(matrix, lambda: leading(total, rank))
        generator = torch.Generator().manual_seed(_SEED + index + self._step * len(self._matrices))
        v = randomised_right(lambda z: sum_over(group, block.T @ (block @ z.to(block.device))), n, rank, generator)
        if matrix.side == "right":
            return self._from_one_rank(matrix, lambda: v)
        g_v = torch.zeros(m, rank, device=block.device)
        g_v[matrix.rows.first : matrix.rows.stop] = block @ v
        g_v = sum_over(group, g_v)
        return self._from_one_rank(matrix, lambda: left_of(g_v))

    def _whole_rows(self, matrix: Matrix, local: torch.Tensor) -> torch.Tensor:
        """The touched rows with each row of the matrix whole on exactly one rank, so that sums over rows are right."""
        rows, block = matrix.rows, matrix.rows.block(local)
        if not rows.cut:
            return block
        gathered = torch.zeros(len(rows.cut), rows.shape[1], dtype=block.dtype, device=block.device)
        for place, slot in rows.own_cut:
            gathered[slot] = block[place]
        return rows.complete(block, sum_over(self._engine.shard_group, gathered))

    def _from_one_rank(self, matrix: Matrix, make: Any) -> torch.Tensor:
        """What one rank makes, on all of the shard group; matrices take ranks by turns."""
        group = self._engine.shard_group
        if group is None:
            return make().float()  # type: ignore[no-any-return]
        maker = self._matrices.index(matrix) % dist.get_world_size(group)
        made = torch.zeros_like(matrix.p)
        if dist.get_rank(group) == maker:
            made.copy_(make())  # in this layout: sums go by the order in memory, and eigenvectors come transposed
        return sum_over(group, made)

    # --------------------------------------------------------------------------------------------- checkpoints, reports

    def kept(self, numbers: Mapping[str, Any]) -> dict[str, Kept]:
        return {name: Kept(shape, span) for name, _, shape, span, _ in self._own()}

    def state(self, spans: Any) -> StepState:
        plain = super().state(spans)
        first = is_first_of_group(self._engine)
        kept = {}
        for name, tensor, shape, span, is_everywhere in self._own():
            held = first or not is_everywhere  # of what every rank has, one copy
            span = span if held else Span(0, 0)
            kept[name] = Kept(shape, span, tensor.flatten().to("cpu", copy=True) if held else None)
        return plain._replace(numbers={"adam_steps": int(self._num_steps), "period": self._last_period}, kept=kept)

    def load_state(self, state: StepState) -> None:
        self._num_steps.fill_(state.numbers["adam_steps"])
        self._last_period = state.numbers["period"]
        for name, tensor, *_ in self._own():
            values = state.kept[name].values
            assert values is not None
            tensor.copy_(values.view_as(tensor))

    def _own(self) -> Iterable[tuple[str, torch.Tensor, tuple[int, int], Span, bool]]:
        """(name, tensor here, whole shape, this rank's span of that, whether every rank of the shard group has it) of
        all that is kept. What one rank alone has may well be whole: ZeRO-1 and -2 give it all of some matrices."""
        for name, rows, side, p, average, squares in self._matrices:
            yield f"{name}.projector", p, (p.shape[0], p.shape[1]), Span(0, p.numel()), True
            rank = p.shape[1]
            whole, start = ((rows.shape[0], rank), rows.first * rank) if side == "right" else ((rank, rows.shape[1]), 0)
            for kind, tensor in (("average", average), ("squares", squares)):
                yield f"{name}.{kind}", tensor, whole, Span(start, start + tensor.numel()), side == "left"

    def check(self) -> None:
        """Replicas choose P each for itself: are they still the same?

        Raises:
            RuntimeError: they are not.
        """
        if not agree_on(torch.stack([matrix.p.double().sum() for matrix in self._matrices])):
            raise RuntimeError(
                "projections differ between ranks at the end of the run: it cannot be trusted. Ranks had different "
                "gradients, or the memory of one is faulty"
            )

    def facts(self) -> dict[str, Any]:
        return {"num_projected_matrices": len(self._modules)}

    def plan(self) -> str:
        config = self.config
        return (
            f"gradients of {len(self._modules)} matrices projected to rank {config.init_rank} ({config.projection}), "
            f"anew every {config.refresh_every_steps} steps"
        )

    def buffers(self) -> Iterable[torch.Tensor]:
        return [tensor for _, tensor, *_ in self._own()]


def projected_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weights ``adapt`` has marked, by their names in the plain model, in canonical order."""
    return {module.projected_as: module for module in model.modules() if hasattr(module, "projected_as")}  # type: ignore[misc]
