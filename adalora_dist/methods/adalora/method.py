"""AdaLoRA (arXiv 2303.10512) as a method, and what plain LoRA shares with it: triplets P diag(lambda) Q.

W = W0 + s P diag(lambda) Q, with s = alpha / init_rank (rsLoRA: alpha / sqrt(init_rank)) for the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from adalora_dist.backbones.experts import ExpertStack, place_of, stacks_of
from adalora_dist.backbones.linears import linear_shape
from adalora_dist.config.methods import AdaLoraConfig, AdaptiveConfig, LowRankConfig, TripletConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.allocator import RankAllocator
from adalora_dist.methods.adalora.compaction import shrink_layers
from adalora_dist.methods.adalora.experts import ExpertTriplets, parts_of, put_beside
from adalora_dist.methods.adalora.layers import LAMBDAS_NAME, SVDLinear, TripletLayer, add_lambdas
from adalora_dist.methods.adalora.peft_stacks import is_swapped
from adalora_dist.methods.adalora.schedule import BudgetSchedule
from adalora_dist.methods.adalora.start import Triplets, read_peft, start_with, with_lambda_in_p
from adalora_dist.methods.protocol import Adapter, Method, Step, adapters_of
from adalora_dist.methods.sites import find_sites, put_around, put_in_place, site_shapes
from adalora_dist.methods.sizes import Sizes
from adalora_dist.methods.update import AdapterWeights, Update
from adalora_dist.sharding.packing import holder


def _start(
    config: LowRankConfig, model: nn.Module, names: Sequence[str], stacks: Sequence[ExpertStack]
) -> dict[str, Triplets]:
    """What ``init_from`` gives, by the name of the matrix.

    Args:
        names: of the matrices that are adapted; ``stacks``: of experts that are.
    """
    if not config.init_from:
        return {}
    swapped = {stack: is_swapped(stack, model.get_submodule(stack.owner)) for stack in stacks_of(model)}
    start = read_peft(Path(config.init_from), config.scale, swapped)
    targets = {*names, *(matrix for stack in stacks for matrix in stack.matrix_names())}
    if unknown := sorted(start.keys() - targets):
        raise UserError(
            f"init_from={config.init_from}: {len(unknown)} of its matrices ({', '.join(unknown[:3])}) are not "
            "among the targets: name them there, and use the adapter's own base model"
        )
    return start


class TripletMethod(Method):
    """A method whose adapters are :class:`TripletLayer`: around linear maps, and beside stacks of experts."""

    config: TripletConfig
    layer: ClassVar[type[SVDLinear]] = SVDLinear

    def sites(self, model: nn.Module) -> tuple[list[str], list[ExpertStack]]:
        """As of :func:`find_sites`."""
        return find_sites(model, self.config)

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        config = self.config
        names, stacks = self.sites(model)
        start = _start(config, model, names, stacks) if isinstance(config, LowRankConfig) else {}

        def make(base: nn.Module, name: str) -> TripletLayer:
            d_in, d_out = linear_shape(base) or (0, 0)
            return self.layer(base, d_in, d_out, config.init_rank, config.scale, config.dropout, name)

        def make_of_experts(experts: nn.Module, stack: ExpertStack) -> ExpertTriplets:
            ranks = [config.init_rank] * stack.num_experts
            return ExpertTriplets(experts, stack, ranks, config.scale, config.dropout)

        put_around(model, names, make)
        put_beside(model, stacks, make_of_experts)
        layers = [layer for layer in adapters_of(model) if isinstance(layer, TripletLayer)]
        for layer in layers:
            self.reset(layer, generator)
        with torch.no_grad():
            self.begin(add_lambdas(model, layers).lam)
        if isinstance(config, LowRankConfig):
            self.begin_with(layers, start, f"init_from={config.init_from}")
        return list(layers)

    def begin_with(self, layers: Iterable[TripletLayer], given: Mapping[str, Triplets], where: str) -> None:
        """Start from triplets of elsewhere at the matrices that have some.

        Args:
            where: they are from, for messages.

        Raises:
            UserError: as :func:`adalora_dist.methods.adalora.start.start_with`.
        """
        own = {name: self.given(triplets) for name, triplets in given.items()}
        for layer in layers if own else ():
            start_with(layer, own, where)

    def groups(self, model: nn.Module) -> dict[float, list[torch.Tensor]]:
        """LoRA+: P, which is LoRA's B, may learn faster than the rest."""
        ratio = self.config.lora_plus_ratio
        trained: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        if ratio == 1:
            return {1.0: trained}
        layers = (layer for layer in adapters_of(model) if isinstance(layer, TripletLayer) and layer.rank)
        of_p = {id(holder(layer.own_parameters()["P"])) for layer in layers}
        return {1.0: [p for p in trained if id(p) not in of_p], ratio: [p for p in trained if id(p) in of_p]}

    def reset(self, layer: TripletLayer, generator: torch.Generator) -> None:
        """Fill P and Q of a new layer with what the run starts from."""
        raise NotImplementedError(f"{type(self).__name__}.reset")

    def begin(self, lam: nn.Parameter) -> None:
        """Fill lambda of all matrices with what the run starts from; it is made as 0."""

    def given(self, triplets: Triplets) -> Triplets:
        """Bring triplets read from ``init_from`` into the form that this method trains."""
        return triplets

    def lacks(self, adapters: Sequence[Adapter], form: str) -> str | None:
        experts = (adapter.name for adapter in adapters if isinstance(adapter, ExpertTriplets))
        if form != "peft" or (name := next(experts, None)) is None:
            return None
        return f"PEFT has no AdaLoRA of experts ({name}): use lora or merged"

    def shrink(self, adapters: Sequence[Adapter], held: Mapping[str, Sequence[int]]) -> None:
        shrink_layers(cast(Sequence[TripletLayer], adapters), [held[adapter.name] for adapter in adapters])

    @classmethod
    def updates(
        cls,
        described: Mapping[str, Mapping[str, Any]],
        held: Mapping[str, Sequence[int]],
        keep: torch.Tensor | None,
        whole: Callable[[str], torch.Tensor | None],
    ) -> Sequence[Update]:
        """The active triplets of every matrix: those of the last selection; before the first, all. Of a stack of
        experts each is a matrix.
        """
        num_triplets = [matrix["init_rank"] for matrix in described.values()]
        if keep is None:
            keep = torch.ones(sum(num_triplets), dtype=torch.bool)
        ranks = [len(held[name]) for name in described]
        lam = whole(LAMBDAS_NAME)
        lams = (torch.ones(sum(ranks)) if lam is None else lam).split(ranks)  # plain LoRA does not train lambda
        updates = []
        for (name, matrix), kept, lam in zip(described.items(), keep.split(num_triplets), lams, strict=True):
            p, qt = whole(f"{name}.P"), whole(f"{name}.Qt")
            p = torch.empty(matrix["d_out"], 0) if p is None else p
            qt = torch.empty(matrix["d_in"], 0) if qt is None else qt
            indices = torch.tensor(held[name], dtype=torch.long)
            form = matrix["scale"], matrix["is_transposed"]
            for part, first, stop in parts_of(name, matrix):
                own = kept[indices] & (indices >= first) & (indices < stop)
                updates.append(AdapterWeights(part, p[:, own].contiguous(), lam[own], qt[:, own].T.contiguous(), *form))
        return updates

    @classmethod
    @torch.no_grad()
    def place(cls, model: nn.Module, updates: Sequence[Update]) -> list[Adapter]:
        """Every matrix at its own rank (0: no branch)."""
        triplets = cast(Sequence[AdapterWeights], updates)
        stacks = {stack.name: stack for stack in stacks_of(model)}
        of_stacks: dict[str, dict[int, AdapterWeights]] = {}
        given: dict[str, list[AdapterWeights]] = {}
        for update in triplets:
            place = place_of(update.name)
            if place is not None and place[0] in stacks:
                of_stacks.setdefault(place[0], {})[place[1]] = update
                continue
            base = model.get_submodule(update.name)
            d_in, d_out = linear_shape(base) or (0, 0)
            given[update.name] = [update]
            put_in_place(model, SVDLinear(base, d_in, d_out, update.rank, update.scale, name=update.name))

        def make(experts: nn.Module, stack: ExpertStack) -> ExpertTriplets:
            found = of_stacks[stack.name]
            given[stack.name] = [found[expert] for expert in sorted(found)]
            ranks = [found[e].rank if e in found else 0 for e in range(stack.num_experts)]
            return ExpertTriplets(experts, stack, ranks, given[stack.name][0].scale)

        put_beside(model, [stacks[name] for name in stacks if name in of_stacks], make)
        layers = [layer for layer in adapters_of(model) if isinstance(layer, TripletLayer)]
        for layer in layers:
            if layer.rank:
                layer.P.copy_(torch.cat([update.P for update in given[layer.name]], dim=1))
                layer.Qt.copy_(torch.cat([update.Q.T for update in given[layer.name]], dim=1))
        if layers:
            lams = [update.lam for layer in layers for update in given[layer.name]]
            add_lambdas(model, layers).lam.copy_(torch.cat(lams))
        return list(layers)


START_OF_TARGET = 1.5
"""b(0) over b(T), as in the paper."""


class AdaptiveMethod(TripletMethod):
    """Ranks adapt to a budget that falls over the run."""

    config: AdaptiveConfig

    def sizes_of(self, shapes: Sequence[tuple[int, int]], fixed: int = 0) -> Sizes:
        """In triplets that are left in the end, counted as if spread evenly over the matrices; it starts with half as
        many more.

        Args:
            shapes: (d_in, d_out) of each matrix.
            fixed: trained numbers that no rank changes.
        """
        num, each = len(shapes), sum(d_in + d_out + 1 for d_in, d_out in shapes)
        largest = max(min(shape) for shape in shapes)

        def settings(budget: int) -> dict[str, Any]:
            return {"init_rank": min(largest, math.ceil(START_OF_TARGET * budget / num)), "target_budget": budget}

        why = "the full rank of the largest matrix"
        return Sizes(lambda b: fixed - (-b * each // num), settings, num * largest, why)

    def reset(self, layer: TripletLayer, generator: torch.Generator) -> None:
        if self.config.start == "matched":
            layer.reset_as_lora(generator)
        else:
            layer.reset(generator, std=None if self.config.init == "orthonormal" else 0.02)

    def begin(self, lam: nn.Parameter) -> None:
        if self.config.start == "matched":
            lam.fill_(1.0)

    def given(self, triplets: Triplets) -> Triplets:
        """With LoRA's start lambda goes into P: the given triplets then grow as the fresh ones do."""
        return with_lambda_in_p(triplets) if self.config.start == "matched" else triplets

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        layers = cast(Sequence[TripletLayer], adapters)
        return RankAllocator(layers, self.config, self.schedule(layers, total_steps))

    def schedule(self, layers: Sequence[TripletLayer], total_steps: int) -> BudgetSchedule:
        """The budget of a run of ``total_steps`` over ``layers``.

        Raises:
            UserError: it does not fit the number of steps, or of triplets.
        """
        config = self.config
        target, num_matrices = config.target_budget, sum(len(layer.init_ranks) for layer in layers)
        return BudgetSchedule.for_run(
            total_steps=total_steps,
            initial_budget=sum(layer.init_rank for layer in layers),
            target_budget=round(config.target_rank * num_matrices) if target is None else target,
            initial_warmup_steps=config.initial_warmup_steps,
            final_steps=config.final_steps,
            mask_interval_steps=config.mask_interval_steps,
            kind=config.budget_schedule,
        )


class AdaLora(AdaptiveMethod):
    """W = W0 + s P diag(lambda) Q."""

    config: AdaLoraConfig
    said = "Adaptive-rank adapters (AdaLoRA, [arXiv 2303.10512](https://arxiv.org/abs/2303.10512))"

    def sizes(self, model: nn.Module) -> Sizes:
        return self.sizes_of(site_shapes(model, self.config))
