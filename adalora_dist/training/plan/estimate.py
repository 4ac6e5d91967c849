"""Bytes on the wire, on disk, and time: counted where they follow from shapes, estimated where a machine decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adalora_dist.sharding.spans import Factor, Span, cut_rows, overlaps
from adalora_dist.training.plan.cluster import Cluster
from adalora_dist.training.plan.memory import FLOAT32, ROOT, ZERO_REUSED, Tensor

DIGEST_NUMBERS = 6
FLOAT64 = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process puts into collectives."""

    per_step: int
    """By the engine: gathered weights, reduced gradients."""
    of_method_per_step: int
    """AdaLoRA's one sum over the shard group: Gram matrices, cut rows, one flag."""
    per_allocation: int
    """AdaLoRA's one sum over all processes: scores and the pattern's digest."""


def traffic_of(
    tensors: Sequence[Tensor],
    parameters: Sequence[Sequence[Factor]],
    cluster: Cluster,
    compute_bytes: int,
    micro_steps: int,
) -> Traffic:
    """
    Args:
        parameters: of AdaLoRA: P, Q and lambda, those together that are packed, lambda last; none with other methods.
    """
    world, engine = cluster.num_shards, cluster.engine
    if cluster.world_size == 1:
        return Traffic(0, 0, 0)
    of_method, factors = 0, [factor for parts in parameters for factor in parts]
    if factors and engine in ("fsdp2", "zero1", "zero2", "zero3"):
        grams = sum(f.rank**2 for f in factors if f.orthogonal)
        of_method = FLOAT32 * (grams + split_elements(parameters, engine, world) + 1)
    allocation = FLOAT64 * (factors[-1].rank + DIGEST_NUMBERS) if factors else 0
    per_step = _of_engine(tensors, engine, world, compute_bytes, micro_steps)
    if cluster.copies > 1:  # of the gradients that it holds, each process adds up those of all copies
        per_step += compute_bytes * sum(t.share(engine, world) for t in tensors if t.is_trained)
    return Traffic(per_step, of_method, allocation)


def _of_engine(tensors: Sequence[Tensor], engine: str, world: int, compute_bytes: int, micro_steps: int) -> int:
    """Bytes per step. Of what is gathered, each process gets what the others have. Shards and their gradients travel as
    they are computed with; DDP's gradients are float32, as the parameters are."""
    num_trained = sum(t.numel for t in tensors if t.is_trained)
    if engine == "ddp":
        return FLOAT32 * num_trained
    trained = compute_bytes * num_trained
    if engine in ("zero1", "zero2"):  # updated slices are gathered; stage 2 reduces gradients in each micro-step
        return (micro_steps if engine == "zero2" else 1) * trained + trained * (world - 1) // world
    numel = sum(t.numel for t in tensors)
    if engine == "fsdp2":
        again = numel - sum(t.numel for t in tensors if t.group < _first_in_backward(tensors))
        reductions = 1
    else:
        again, reductions = max(0, numel - ZERO_REUSED // 2), micro_steps
    return micro_steps * compute_bytes * (numel + again) * (world - 1) // world + reductions * trained


def _first_in_backward(tensors: Sequence[Tensor]) -> int:
    """The first group that backward comes to: those before have nothing to learn, and the root's stays from forward."""
    return min((t.group for t in tensors if t.is_trained and t.group != ROOT), default=0)


def split_elements(parameters: Sequence[Sequence[Factor]], engine: str, world: int) -> int:
    """Elements of rows of P and Q that are cut between processes: none in blocks of rows; at most so many in slices.

    Args:
        parameters: as of :func:`traffic_of`.
    """
    if engine in ("zero1", "zero2"):  # one flat buffer of all parameters: as many cuts as processes, less one
        return max(f.rank for parts in parameters for f in parts if f.orthogonal) * (world - 1)
    counted: dict[tuple[tuple[int, int], ...], int] = {}
    total = 0
    for parts in parameters:
        if len(parts) == 1 and (engine == "fsdp2" or not parts[0].orthogonal):
            continue
        key = tuple((factor.rows, factor.rank) for factor in parts)
        if key not in counted:
            sizes = [factor.numel for factor in parts]
            numel, chunk = sum(sizes), -(-sum(sizes) // world)
            held = [Span(min(r * chunk, numel), min((r + 1) * chunk, numel)) for r in range(world)]
            cut = {(f.factor, f.row) for span in held for f in cut_rows(parts, overlaps(span, sizes))}
            counted[key] = sum(parts[k].rank for k, _ in cut)
        total += counted[key]
    return total


@dataclass(frozen=True)
class Time:
    """Seconds of a step, by roofline: the longer of both, since engines overlap them."""

    compute: float
    link: float

    @property
    def step(self) -> float:
        return max(self.compute, self.link)


def time_of(
    num_matmul_parameters: int, tokens: int, cluster: Cluster, traffic: Traffic, recomputes: bool, trains_all: bool
) -> Time:
    """
    Args:
        num_matmul_parameters: of the backbone's linear maps.
        tokens: of a batch over all processes, at the longest.
        recomputes: gradient checkpointing: the forward is done twice.
        trains_all: gradients of the backbone's weights are made, too.
    """
    # A product costs 2 operations per weight and token: forward, gradient of the input, and of the weight if trained.
    passes = 2 + recomputes + trains_all
    flops = 2 * passes * num_matmul_parameters * tokens / cluster.world_size
    return Time(flops / cluster.flops, (traffic.per_step + traffic.of_method_per_step) / cluster.link_rate)
