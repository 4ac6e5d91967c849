"""``adalora-dist plan``: does a run fit, what travels, how long may it take; the smallest change that makes it fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adalora_dist.backbones.linears import linear_shape
from adalora_dist.backbones.load import dtype_named, name_blocks
from adalora_dist.backbones.parts import input_embeddings
from adalora_dist.backbones.quantization import check_engine
from adalora_dist.config.engines import BACKBONE_SHARDING
from adalora_dist.config.sections import RunConfig
from adalora_dist.methods.adalora.layers import SVDLinear
from adalora_dist.methods.adalora.schedule import BudgetSchedule
from adalora_dist.methods.packing import pack_adapters
from adalora_dist.methods.protocol import adapters_of
from adalora_dist.sharding.packing import packs_of
from adalora_dist.sharding.spans import FACTORS_OF_MATRIX, Factor
from adalora_dist.training.engine import num_micro_steps
from adalora_dist.training.plan.cluster import Cluster
from adalora_dist.training.plan.estimate import Time, Traffic, time_of, traffic_of
from adalora_dist.training.plan.fake import StepBytes, longest, step_bytes
from adalora_dist.training.plan.memory import FLOAT32, ROOT, Memory, Tensor, after_freeze, memory_of


@dataclass(frozen=True)
class Plan:
    """What a run would be on a cluster. Memory is one process's."""

    cluster: Cluster
    before: Memory
    after: Memory
    """Once the pattern is frozen; as ``before`` where no budget falls."""
    micro_batch: int
    micro_steps: int
    tokens: int
    """Of a batch over all processes, if every sequence is as long as the settings allow."""
    traffic: Traffic
    time: Time
    checkpoint_bytes: int
    merged_bytes: int
    adapter_bytes: int
    """At the end: the active triplets."""

    @property
    def peak(self) -> int:
        return max(self.before.peak, self.after.peak)


class Planner:
    """Plans of one run for any number of clusters and variants.

    Args:
        model: adapted, on the meta device.
        settings: the model's own configuration.
        schedule: None where no budget falls.
    """

    def __init__(
        self, config: RunConfig, auto_class: Any, settings: Any, model: nn.Module, schedule: BudgetSchedule | None
    ) -> None:
        self.config, self._auto_class, self._settings, self._schedule = config, auto_class, settings, schedule
        self._tensors, self._parameters = list(_tensors(model)), [[factor] for factor in _factors(model)]
        model = copy.deepcopy(model)
        pack_adapters(model, config.adapter)
        self._packed = list(_tensors(model)), list(_packed(model, [factor for [factor] in self._parameters]))
        self._num_matmul = sum(t.numel for t in self._tensors if t.is_quantized)
        self._dtype = dtype_named(config.model.dtype) or getattr(settings, "dtype", None) or torch.float32
        self._alone: dict[tuple[Any, ...], StepBytes] = {}

    def plan(self, cluster: Cluster, config: RunConfig | None = None) -> Plan:
        """
        Args:
            config: a variant of the run's: of the micro-batch, checkpointing and quantisation.

        Raises:
            UserError: as :func:`~adalora_dist.training.plan.fake.step_bytes`, and what the run would refuse of engine
                and quantisation.
        """
        config = config or self.config
        train, quantization, world = config.train, config.quantization, cluster.world_size
        check_engine(quantization, cluster.engine)
        micro_steps = num_micro_steps(train, world, longest(config))
        micro_batch = -(-train.batch_size // (world * micro_steps))
        key = micro_batch, train.gradient_checkpointing, train.checkpoint_activations
        if key not in self._alone:
            self._alone[key] = step_bytes(config, self._auto_class, self._settings, self._dtype, micro_batch)
        compute = 4 if train.precision == "fp32" else 2
        tensors, parameters = self._tensors, self._parameters
        if cluster.engine in BACKBONE_SHARDING and train.pack_adapters and not train.compile:
            tensors, parameters = self._packed
        before = memory_of(
            tensors, self._alone[key], cluster, self._dtype.itemsize, compute, config.adapter.adapts_ranks,
            quantization.quantization, quantization.double_quant, micro_steps,
        )  # fmt: skip
        schedule = self._schedule
        share = 1.0 if schedule is None else schedule.target_budget / schedule.initial_budget
        is_compacted = schedule is not None and bool(getattr(config.adapter, "compact", False))
        trained = FLOAT32 * sum(t.numel for t in self._tensors if t.is_trained)
        frozen = sum(t.numel for t in self._tensors if not t.is_trained)
        tokens = train.batch_size * longest(config)
        traffic = traffic_of(tensors, parameters, cluster, compute, micro_steps)
        return Plan(
            cluster, before, after_freeze(before, share, is_compacted), micro_batch, micro_steps, tokens, traffic,
            time_of(self._num_matmul, tokens, cluster, traffic, train.gradient_checkpointing,
                    config.adapter.trains_backbone),
            # Values, two moments, and with AdaLoRA both averages.
            checkpoint_bytes=trained * (5 if parameters else 3),
            merged_bytes=frozen * self._dtype.itemsize if frozen else trained,
            adapter_bytes=round(trained * share),
        )  # fmt: skip

    def changes(self, cluster: Cluster) -> Iterator[tuple[str, Plan]]:
        """What could be changed to need less, the smallest change first, each on top of those before it."""
        config = self.config

        def with_train(**fields: Any) -> RunConfig:
            return config.model_copy(update={"train": config.train.model_copy(update=fields)})

        words: list[str] = []
        size = self.plan(cluster).micro_batch
        while size > 1:
            size //= 2
            smaller = max(k for k in range(1, size + 1) if config.train.batch_size % k == 0)
            name, value = "micro_batch_size", smaller
            if config.train.micro_batch_tokens:
                name, value = "micro_batch_tokens", smaller * longest(config)
            config = with_train(**{name: value})
            words = [f"--{name.replace('_', '-')} {value}"]
            yield words[0], self.plan(cluster, config)
        if not config.train.gradient_checkpointing:
            config = with_train(gradient_checkpointing=True)
            words.append("--gradient-checkpointing")
            yield " ".join(words), self.plan(cluster, config)
        quantization = config.quantization  # of int8 no engine shards weights, of uint8 FSDP2 does not
        shards = quantization.quantization != "int8" and quantization.quant_storage != "uint8"
        if shards and (cluster.engine not in ("fsdp2", "zero3") or cluster.copies > 1) and cluster.world_size > 1:
            cluster = Cluster(**{**vars(cluster), "engine": "fsdp2", "copies": 1})
            words.append("--engine fsdp2")
            yield " ".join(words), self.plan(cluster, config)
        if quantization.quantization == "none" and not config.adapter.trains_backbone:
            quantized = quantization.model_copy(update={"quantization": "nf4"})
            config = config.model_copy(update={"quantization": quantized})
            words.append("--quantization nf4")
            yield " ".join(words), self.plan(cluster, config)
        for nodes in (2, 4, 8, 16):
            engine = cluster.engine if cluster.engine != "single" else "fsdp2" if shards else "ddp"
            chosen = [f"--engine {engine}"] if engine != cluster.engine else []
            copies = nodes * cluster.nodes if cluster.copies > 1 else 1
            larger = Cluster(**{**vars(cluster), "nodes": nodes * cluster.nodes, "engine": engine, "copies": copies})
            if larger.world_size <= config.train.batch_size:
                yield " ".join([*words, *chosen, f"--nodes {larger.nodes}"]), self.plan(larger, config)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """The parameters of an adapted model on the meta device, each once."""
    names = name_blocks(model)
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    group_of = {id(p): k for k, block in enumerate(blocks, start=1) for p in block.parameters()}
    # accelerate makes groups of their own of the embeddings and the head.
    embeddings, head = input_embeddings(model), model.get_output_embeddings()  # type: ignore[operator]
    for k, module in ((len(blocks) + 1, head), (0, embeddings)):
        group_of |= {id(p): k for p in (() if module is None else module.parameters())}
    # What is quantised are the linear maps within blocks, not the head.
    linears = (m for block in blocks for m in block.modules() if linear_shape(m) is not None)
    in_linears = {id(m.weight) for m in linears if isinstance(getattr(m, "weight", None), nn.Parameter)}
    for p in model.parameters():
        is_packed = id(p) in in_linears and not p.requires_grad
        yield Tensor(p.shape[0] if p.ndim else 1, p.numel(), group_of.get(id(p), ROOT), p.requires_grad, is_packed)


def _factors(model: nn.Module) -> Iterator[Factor]:
    """AdaLoRA's P, Q and lambda, in canonical order; nothing with other methods."""
    first = 0
    for layer in adapters_of(model):
        if isinstance(layer, SVDLinear) and layer.rank and layer.lambdas.lam.requires_grad:
            for kind, rows in zip(FACTORS_OF_MATRIX, (layer.d_out, layer.d_in), strict=True):
                yield Factor(kind, rows, layer.rank, first)
            first += layer.rank
    if first:
        yield Factor("lam", 1, first, 0)


def _packed(model: nn.Module, factors: Sequence[Factor]) -> Iterator[list[Factor]]:
    """``factors`` as a packed model has them: those of a pack together, lambda last."""
    adapters = [a for a in adapters_of(model) if isinstance(a, SVDLinear) and a.rank]
    places = [(adapter, kind) for adapter in adapters for kind in FACTORS_OF_MATRIX]
    of_place: dict[Any, Factor] = dict(zip(places, factors, strict=False))  # LoRA has none
    for module in model.modules() if of_place else ():
        yield from ([of_place.pop(place) for place in pack.places] for pack in packs_of(module).values())
    yield from ([factor] for factor in [*of_place.values(), *factors[len(places) :]])
