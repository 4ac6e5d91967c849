"""ReLoRA (arXiv 2307.05695): LoRA that is merged into W at restarts, so that the sum of all cycles has a high rank.

At a restart, between two optimizer steps, P and Q join the history, W becomes round(W0 + s sum P_i Q_i), P is 0 and Q
drawn again, and Adam's averages and step count of both are gone. W always follows from the original W0 and the history,
never from the last W: it is rounded once whatever the number of cycles, and a run that goes on builds the same bits.
P and Q start as LoRA's do, so there is a gradient from the first step on.

In memory beside LoRA's, on the CPU: this rank's share of W0, and all factors, r (d_in + d_out) numbers per cycle and
matrix.
Communication: at a restart the factors, r (d_in + d_out) numbers per matrix, are put together on all ranks. Of W
nothing is moved: each rank adds to the rows or the slice that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.backbones.linears import has_readable_weight, is_conv1d, is_packed
from adalora_dist.config.methods.relora import ReloraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.method import TripletMethod
from adalora_dist.methods.adapter import lora_start
from adalora_dist.methods.branch import BranchLinear, BranchStep, drawn_seed
from adalora_dist.methods.protocol import Adapter, Kept, Method, Step, StepState, adapters_of
from adalora_dist.methods.sites import find_targets, put_around, target_shapes
from adalora_dist.methods.sizes import Sizes, of_ranks
from adalora_dist.methods.update import AdapterWeights, Update
from adalora_dist.sharding.base import ShardEngine, Span, agree_on, is_first_of_group
from adalora_dist.sharding.tensors import local_elements, release_gathered

_KINDS = ("P", "Qt")


class ReloraLinear(BranchLinear):
    """Parameters of the present cycle: P (d_out, r), LoRA's B, 0 at its start; Qt (d_in, r), its A transposed.

    Args:
        seed: of Qt in each cycle.
    """

    def __init__(self, base: nn.Module, name: str, rank: int, scale: float, dropout: float, seed: int) -> None:
        super().__init__(base, name, rank, scale, dropout)
        self.P, self.Qt = self.vector(self.d_out, rank), self.vector(self.d_in, rank)
        self.seed = seed
        self.merged_factors: dict[str, torch.Tensor] = {}
        """Those of all past cycles, on the CPU; they are in the base's weight."""
        with torch.no_grad():
            self.Qt.copy_(self.drawn(0))

    def drawn(self, cycle: int) -> torch.Tensor:
        """Qt at the start of a cycle, (d_in, r) ~ U(-a, a), a = 1/sqrt(d_in), on the CPU, alike on every process."""
        generator = torch.Generator().manual_seed((self.seed + cycle) % 2**63)
        return lora_start((self.d_in, self.rank), self.d_in, generator)

    def past(self) -> dict[str, torch.Tensor]:
        return self.merged_factors

    def branch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens @ cast(torch.Tensor, self.Qt).to(tokens.dtype), self.scale * cast(torch.Tensor, self.P)


class ReloraStep(BranchStep):
    """Counts steps to the next restart, and makes it."""

    def __init__(self, layers: Sequence[ReloraLinear], config: ReloraConfig, total_steps: int) -> None:
        super().__init__(layers)
        self.relora = list(layers)
        self.total_steps = total_steps
        self.every, self.num_warmup = config.cycle_of(total_steps)
        self.num_restarts = 0
        self._history: dict[str, torch.Tensor] = {}  # MATRIX.P, MATRIX.Qt of all past cycles, side by side, on the CPU
        self._original: list[torch.Tensor] = []  # of each layer what this rank holds of W0, flat, on the CPU

    def bind(self, engine: ShardEngine) -> torch.Tensor:
        self._engine = engine
        if not self._original:
            self._original = [local_elements(_weight(layer))[0].to("cpu", copy=True) for layer in self.relora]
        return super().bind(engine)

    def rate_factor(self, step: int) -> float:
        """(u + 1) / w in the w steps after a restart, u of them done; else 1."""
        done = step % self.every
        return (done + 1) / self.num_warmup if step >= self.every and done < self.num_warmup else 1.0

    def replaces(self, hooks: Any, model: nn.Module, optimizer: Any) -> str:
        due = hooks.step // self.every
        if due == self.num_restarts or hooks.step >= self.total_steps:
            return ""
        release_gathered(model)
        self._restart()
        return f"restart {self.num_restarts}: merged into {len(self.relora)} matrices, which begin again"

    @torch.no_grad()
    def _restart(self) -> None:
        self.num_restarts += 1
        for index, name in enumerate(self.parameters()):
            factor = self._engine.full(index).cpu()
            past = self._history.get(name)
            self._history[name] = factor if past is None else torch.cat((past, factor), dim=1)
        self._merge()
        device = self._engine.values()[0].device
        values = []
        for layer in self.relora:
            starts = {"P": torch.zeros(layer.d_out, layer.rank), "Qt": layer.drawn(self.num_restarts)}
            values += [starts[name.rpartition(".")[2]].flatten() for name in layer.trained()]
        cut = [value[s.start : s.stop].to(device) for value, s in zip(values, self._engine.spans(), strict=True)]
        self._engine.restore(cut, [{} for _ in cut])  # without averages and step count, as before the first step

    def _merge(self) -> None:
        """W of this rank's elements, from the original and all past cycles."""
        for layer, original in zip(self.relora, self._original, strict=True):
            local, span = local_elements(_weight(layer))
            layer.merged_factors = {}
            if not self._history:
                local.copy_(original)
                continue
            layer.merged_factors = {f"{name}{_PAST}": self._history[name] for name in layer.trained()}
            p, qt = (self._history[f"{layer.name}.{kind}"].to(local.device) for kind in _KINDS)
            rows, columns = (qt, p) if is_conv1d(layer.base) else (p, qt)
            width = len(columns)
            first, stop = span.start // width, -(-span.stop // width)
            added = (layer.scale * rows[first:stop]) @ columns.T
            part = added.flatten()[span.start - first * width :][: span.stop - span.start]
            local.copy_(original.to(local.device, torch.float32) + part)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def whole(self, name: str) -> torch.Tensor | None:
        return self._history.get(name.removesuffix(_PAST)) if name.endswith(_PAST) else None

    def kept(self, numbers: Mapping[str, Any]) -> dict[str, Kept]:
        width = numbers["restarts"]
        sizes = {f"{layer.name}.{k}": size for layer in self.relora for k, size in _sizes(layer).items()}
        ranks = {f"{layer.name}.{k}": layer.rank * width for layer in self.relora for k in _KINDS}
        found = {name + _PAST: (rows, ranks[name]) for name, rows in sizes.items() if width}
        return {name: Kept(shape, Span(0, shape[0] * shape[1])) for name, shape in found.items()}

    def state(self, spans: Any) -> StepState:
        """The factors of past cycles are whole on every rank; the first of them has them written."""
        plain, numbers = super().state(spans), {"restarts": self.num_restarts}
        writes = is_first_of_group(self._engine)
        kept = {
            name: held._replace(values=cast(torch.Tensor, self.whole(name)).flatten())
            if writes
            else held._replace(span=Span(0, 0))
            for name, held in self.kept(numbers).items()
        }
        return plain._replace(numbers=numbers, kept=kept)

    @torch.no_grad()
    def load_state(self, state: StepState) -> None:
        super().load_state(state)
        merged_before, self.num_restarts = self.num_restarts, state.numbers["restarts"]
        self._history = {
            name.removesuffix(_PAST): cast(torch.Tensor, held.values).view(held.shape)
            for name, held in state.kept.items()
        }
        if self.num_restarts or merged_before:
            self._merge()
            # So that the engine sends round what it keeps whole on every rank.
            values = [value.clone() for value in self._engine.values()]
            states = [{kind: held.clone() for kind, held in own.items()} for own in self._engine.states()]
            self._engine.restore(values, states)

    # ------------------------------------------------------------------------------------------------------ the end

    def check(self) -> None:
        """Are the merged factors the same everywhere?

        Raises:
            RuntimeError: they are not.
        """
        sums = [factor.double().sum() for factor in self._history.values()]
        if sums and not agree_on(torch.stack(sums).to(self._engine.values()[0].device)):
            raise RuntimeError(
                "merged factors differ between ranks at the end of the run: it cannot be trusted. Ranks had different "
                "adapters, or the memory of one is faulty"
            )

    def rank_pattern(self) -> dict[str, int]:
        return {layer.name: layer.rank * (self.num_restarts + 1) for layer in self.relora}

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"restart_every_steps": self.every, "restart_warmup_steps": self.num_warmup}

    def plan(self) -> str:
        return f"merged and restarted every {self.every} steps, {-(-self.total_steps // self.every) - 1} times"


_PAST = ".past"


def _weight(layer: BranchLinear) -> torch.Tensor:
    return cast(torch.Tensor, layer.base.weight)


def _sizes(layer: ReloraLinear) -> dict[str, int]:
    return {"P": layer.d_out, "Qt": layer.d_in}


class Relora(Method):
    """W = W0 + s sum P_i Q_i over cycles. What it leaves is LoRA of rank cycles * r, and so are its adapter folders."""

    config: ReloraConfig
    said = "Low-rank adapters merged at restarts (ReLoRA, [arXiv 2307.05695](https://arxiv.org/abs/2307.05695))"

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        """
        Raises:
            UserError: a target without a match, or a weight that nothing can be added to, as in a model whose files
                are quantised.
        """
        config, names = self.config, find_targets(model, self.config.targets)
        for name in names:
            base = model.get_submodule(name)
            if is_packed(base) or not has_readable_weight(base):
                raise UserError(
                    f"method=relora: {name} is a {type(base).__name__}, whose weight a restart could not merge into: "
                    "take the model that is not quantised, or set method to lora"
                )
        seeds = {name: drawn_seed(generator) for name in names}

        def make(base: nn.Module, name: str) -> ReloraLinear:
            return ReloraLinear(base, name, config.init_rank, config.scale, config.dropout, seeds[name])

        return list(put_around(model, names, make))

    def sizes(self, model: nn.Module) -> Sizes:
        """Of one cycle, which is what is trained at a time."""
        shapes = target_shapes(model, self.config.targets)
        return of_ranks(shapes, sum(d_in + d_out for d_in, d_out in shapes))

    def parameter_groups(self, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """Adapters apart from what is trained besides: ZeRO counts the steps of a group, and a restart begins anew."""
        own = {id(p) for adapter in adapters_of(model) for p in adapter.trained().values()}
        made = []
        for group in super().parameter_groups(model, learning_rate):
            for of_adapters in (True, False):
                if chosen := [p for p in group["params"] if (id(p) in own) == of_adapters]:
                    made.append({**group, "params": chosen})
        return made

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        every, num_warmup = self.config.cycle_of(total_steps)
        if every >= total_steps > 1 and self.config.restart_every_steps is not None:
            raise UserError(
                f"restart_every_steps={every} in a run of {total_steps} steps: there would be no restart; set it to "
                f"at most {total_steps - 1}, or method to lora"
            )
        if num_warmup > every:
            raise UserError(
                f"restart_warmup_steps={num_warmup} with {every} steps between restarts: the rate would never be "
                f"reached; set it to at most {every}"
            )
        return ReloraStep(cast(Sequence[ReloraLinear], adapters), self.config, total_steps)

    @classmethod
    def updates(
        cls,
        described: Mapping[str, Mapping[str, Any]],
        held: Mapping[str, Sequence[int]],
        keep: torch.Tensor | None,
        whole: Callable[[str], torch.Tensor | None],
    ) -> Sequence[Update]:
        """All cycles together."""
        updates = []
        for name, matrix in described.items():
            factors = []
            for kind in _KINDS:
                parts = [whole(f"{name}.{kind}{_PAST}"), whole(f"{name}.{kind}")]
                factors.append(torch.cat([part for part in parts if part is not None], dim=1))
            p, qt = factors
            ones, q = torch.ones(p.shape[1]), qt.T.contiguous()
            updates.append(AdapterWeights(name, p, ones, q, matrix["scale"], matrix["is_transposed"]))
        return updates

    @classmethod
    def place(cls, model: nn.Module, updates: Sequence[Update]) -> list[Adapter]:
        return TripletMethod.place(model, updates)
