"""A plan in words: one table of memory, then traffic, disk, time, and what fits."""

from __future__ import annotations

from collections.abc import Callable

from adalora_dist.artifacts.tables import aligned
from adalora_dist.io.progress import duration
from adalora_dist.training.plan.cluster import GIGABYTES, USABLE, Cluster
from adalora_dist.training.plan.fake import NotPlanned
from adalora_dist.training.plan.memory import Memory
from adalora_dist.training.plan.plan import Plan, Planner

SIZES_GB = (24.0, 48.0, GIGABYTES)
"""Of GPUs that are told of in any case."""


def size(num_bytes: float) -> str:
    """In decimal units, as data sheets have memory and links."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= one:
            return f"{num_bytes / one:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def memory_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Rows of the table: what, before and after the freeze."""
    parts: dict[str, Callable[[Memory], int]] = {
        "frozen weights": lambda m: m.weights - m.quantized,
        "quantised weights": lambda m: m.quantized,
        "trained, with copies": lambda m: m.adapters,
        "optimizer": lambda m: m.optimizer,
        "importance": lambda m: m.importance,
        "gathered from others": lambda m: m.gathered,
        "activations": lambda m: m.activations,
        "gradients": lambda m: m.gradients,
        "peak": lambda m: m.peak,
    }
    rows = [("a process holds", "before the freeze", "after it")]
    for name, part in parts.items():
        before, after = part(plan.before), part(plan.after)
        if before or after:
            rows.append((name, size(before), size(after)))
    return rows


def cluster_text(planner: Planner, cluster: Cluster, num_steps: int) -> str:
    """What :meth:`Planner.plan` finds, and the smallest change that fits if it does not."""
    plan = planner.plan(cluster)
    traffic, time = plan.traffic, plan.time
    rate = f"{cluster.flops / 1e12:g} TFLOP/s, {cluster.link_rate / 1e9:g} GB/s"
    longer = "computing" if time.compute >= time.link else "the link"
    lines = [
        f"Plan       {cluster.said()}: {cluster.world_size} processes, {_batches(plan)}",
        *_table(plan),
        f"Wire       {size(traffic.per_step)} into collectives per process and step, and of AdaLoRA's own "
        f"{size(traffic.of_method_per_step)}; {size(traffic.per_allocation)} per allocation",
        f"Disk       checkpoint {size(plan.checkpoint_bytes)}, merged model {size(plan.merged_bytes)}, adapter "
        f"{size(plan.adapter_bytes)}",
        f"Time       {time.step:.2f} s a step at best, {duration(time.step * num_steps)} in all; {longer} decides",
        f"           assumed: {rate} a GPU, computing and sending at once, nothing lost to padding, data or evaluation",
        _fits(planner, cluster, plan),
    ]
    return "\n".join(lines)


def own_text(planner: Planner, cluster: Cluster) -> str:
    """For a run's own dry run: memory alone, and without a plan the reason in its place."""
    try:
        plan = planner.plan(cluster)
    except NotPlanned as error:
        return f"Memory     not planned: {error}"
    several = f"one of {cluster.world_size} processes" if cluster.world_size > 1 else "one process"
    lines = [f"Memory     of {several} under {cluster.engine_said}: {_batches(plan)}", *_table(plan)]
    return "\n".join([*lines, _fits(planner, cluster, plan)])


def _batches(plan: Plan) -> str:
    return (
        f"{plan.micro_batch} sequences each in {plan.micro_steps} micro-step(s), as long as the settings allow "
        f"({plan.tokens:,} tokens a batch)"
    )


def _table(plan: Plan) -> list[str]:
    told = "           Gradients come as activations go: of both, the larger counts towards the peak."
    return ["", aligned(memory_rows(plan)), "", told]


def _fits(planner: Planner, cluster: Cluster, plan: Plan) -> str:
    sizes = sorted({*SIZES_GB, cluster.gigabytes})
    said = [f"{gb:g} GB {'yes' if plan.peak <= USABLE * gb * 1e9 else 'no'}" for gb in sizes]
    line = f"Fits       {', '.join(said)} ({USABLE:.0%} of a GPU's memory is counted on)"
    if plan.peak <= USABLE * cluster.gigabytes * 1e9:
        return line
    for words, changed in planner.changes(cluster):
        if changed.peak <= USABLE * cluster.gigabytes * 1e9:
            return f"{line}\n           the smallest change that fits: {words} (peak {size(changed.peak)})"
    return f"{line}\n           nothing that is tried here makes it fit: take larger GPUs, or a smaller model"
