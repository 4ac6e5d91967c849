"""What a run would be: steps, budgets, trainable parameters. Reads no weights, starts no engine, writes no files.

The model is built on the meta device from its configuration alone. Configurations of the models that presets name come
with the recipes (recipes/configs/architectures), and so do the sizes of the public data sets: no network is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.backbones.files import refuse_odd_sizes
from adalora_dist.backbones.fit import check_lengths, lengths_of
from adalora_dist.backbones.load import refuse_code_from_elsewhere
from adalora_dist.config.activations import check_activations_engine
from adalora_dist.config.compilation import check_compile_engine
from adalora_dist.config.engines import check_prefetch_engine
from adalora_dist.config.merging import check_merging_engine
from adalora_dist.config.methods import TargetsConfig
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError, reason_of
from adalora_dist.methods import method_for
from adalora_dist.methods.adalora.schedule import BudgetSchedule
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.parameter_budget import Fitted, fit, positions_taken
from adalora_dist.methods.protocol import others_trained
from adalora_dist.methods.shares import shares_line, weight_shares
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.rows.public import count_rows
from adalora_dist.training.deepspeed_settings import filled, is_deepspeed, settings_asked_for
from adalora_dist.training.engine import num_micro_steps
from adalora_dist.training.plan.cluster import PLANNED, Cluster
from adalora_dist.training.plan.plan import Planner
from adalora_dist.training.plan.text import cluster_text, own_text
from adalora_dist.training.prepared import total_steps

SHOWN_ALLOCATIONS = 3


@dataclass(frozen=True)
class Described:
    """What the plan of a run was made from."""

    config: RunConfig
    """With the adapter's settings as the model has them."""
    auto_class: Any
    architecture: Any
    """The model's own configuration."""
    model: nn.Module
    """Adapted, on the meta device."""


@dataclass(frozen=True)
class DryRun:
    """The plan of a run. Parameters are counted in numbers, budgets in triplets."""

    model: str
    num_parameters: int
    """Of the backbone with its head, without adapters."""
    num_rows: int
    num_steps: int
    num_matrices: int
    num_adapter_parameters: int
    """At the start: every matrix at init_rank."""
    num_other_trained: int
    """Trained in full besides: a new head, or the whole model."""
    num_kept: int
    """Of the adapters' those that no selection removes."""
    sizes: tuple[int, ...]
    """Parameters of one triplet, d_in + d_out + 1 (plain LoRA: without the 1), of each matrix."""
    shares: dict[str, int]
    """Numbers of the model by what becomes of them, see ``weight_shares``."""
    schedule: BudgetSchedule | None
    """None where no budget falls."""
    fitted: Fitted | None
    """None where no budget of parameters is set."""
    described: Described
    """What this was found from."""

    @property
    def allocations(self) -> list[tuple[int, int]]:
        """(0-based step, budget after it) of every allocation."""
        if self.schedule is None:
            return []
        steps = range(self.schedule.total_steps)
        return [(step, self.schedule.budget(step)) for step in steps if self.schedule.allocates(step)]

    @property
    def num_final(self) -> int:
        """Adapter parameters at the end, if the final budget is spread evenly over the matrices."""
        if self.schedule is None:
            return self.num_adapter_parameters
        return self.num_kept - (-self.schedule.target_budget * sum(self.sizes) // len(self.sizes))  # rounded up

    def final_range(self, init_rank: int) -> tuple[int, int]:
        """Fewest and most adapter parameters that the final budget can leave: all in small matrices, or in large."""
        assert self.schedule is not None
        each = sorted(size for size in self.sizes for _ in range(init_rank))
        budget = self.schedule.target_budget
        return self.num_kept + sum(each[:budget]), self.num_kept + sum(each[len(each) - budget :])


def plan_run(
    config: RunConfig, auto_class: Any, num_rows: int, architectures: Path, demo: str, **changes: Any
) -> DryRun:
    """Resolve everything that does not need weights.

    Args:
        auto_class: ``AutoModelForCausalLM`` or a sibling.
        num_rows: of the training data.
        architectures: folder with NAME.json, a configuration for every model name that ends with NAME.
        demo: NAME of the recipe's demonstration model, for an empty model name.
        changes: to the model's configuration, such as num_labels.

    Raises:
        UserError: the model's configuration cannot be had, or what the run itself would refuse.
    """
    name = config.model.name or demo
    architecture = _architecture(config, name, architectures)
    for key, value in changes.items():
        setattr(architecture, key, value)
    try:
        refuse_odd_sizes(name, architecture.to_dict())
        with torch.device("meta"):
            model = auto_class.from_config(architecture)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model={name!r}: its config.json describes no {auto_class.__name__.removeprefix('Auto')} "
            f"({reason_of(error, 200)}): give a folder that save_pretrained wrote"
        ) from error
    check_lengths(model, lengths_of(config), positions_taken(model, config.adapter))
    num_parameters = sum(p.numel() for p in model.parameters())
    if config.adapter.trains_backbone:
        model.float()
    fitted = fit(model, config.adapter)
    adapter = config.adapter if fitted is None else fitted.config
    adapters = adapt(model, adapter, config.train.seed)
    others = sum(p.numel() for p in {p for _, p in others_trained(model)})  # tied weights have several names
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = BatchPlan([1] * num_rows, [1] * num_rows, config.train.batch_size, config.train.seed)
    num_steps = total_steps(config.train, plan)
    schedule = method_for(adapter).step(adapters, num_steps).schedule
    sizes = tuple(adapter.part_size for adapter in adapters for _ in adapter.matrix_names())
    of_parts = sum(adapter.part_size * len(adapter.held()) for adapter in adapters)
    described = Described(config.model_copy(update={"adapter": adapter}), auto_class, architecture, model)
    return DryRun(
        name, num_parameters, num_rows, num_steps, len(sizes), trained - others, others,
        trained - others - of_parts, sizes, weight_shares(model), schedule, fitted, described,
    )  # fmt: skip


def dry_run(
    config: RunConfig,
    auto_class: Any,
    architectures: Path,
    demo: str,
    tasks: Sequence[str],
    load: Callable[[], Sized],
    **changes: Any,
) -> None:
    """Print :func:`plan_run` of the same arguments, on rank 0 alone.

    Args:
        tasks: of ``PUBLIC_ROWS``, whose rows are counted there where the data is the Hub's.
        load: the training rows where it is not.
    """
    cluster = PLANNED.get() or Cluster.here()
    check_activations_engine(config.train, cluster.engine)
    uses_deepspeed = cluster.engine.startswith("zero")
    if PLANNED.get() is None and is_deepspeed():
        uses_deepspeed, train, num_steps = True, config.train, num_micro_steps(config.train, cluster.world_size)
        precision = "" if train.precision == "auto" else train.precision
        filled(settings_asked_for(), train, cluster.world_size, num_steps, precision)
    check_compile_engine(config.train.compile, uses_deepspeed)
    check_prefetch_engine(config.train.fsdp_prefetch, cluster.engine == "fsdp2" and cluster.world_size > 1)
    check_merging_engine(config.evaluation, cluster.engine)
    num_rows = count_rows(cast(Any, config).data, tasks, load, config.evaluation.eval_every > 0)
    run = plan_run(config, auto_class, num_rows, architectures, demo, **changes)
    if os.environ.get("RANK", "0") != "0":
        return
    print(plan_text(run, config))
    described = run.described
    planner = Planner(described.config, described.auto_class, described.architecture, described.model, run.schedule)
    if PLANNED.get() is not None:
        print(cluster_text(planner, cluster, run.num_steps))
    else:
        print(own_text(planner, cluster))
        print("Other machines, traffic, disk and time: adalora-dist plan RECIPE --gpus 8x80GB, and the same flags")


def plan_text(run: DryRun, config: RunConfig) -> str:
    """The plan in a few lines."""

    def share(count: int) -> str:
        return f"{count:,} ({count / run.num_parameters:.2%} of the model)"

    adapter, train = config.adapter if run.fitted is None else run.fitted.config, config.train
    length = f"{train.epochs:g} epochs" if train.max_steps is None else "max_steps"
    lines = [
        "Dry run: no weights are read, nothing is trained or written.",
        f"Model      {run.model}, {run.num_parameters:,} parameters",
        f"Steps      {run.num_steps:,}: {length} of {run.num_rows:,} rows in batches of {train.batch_size}",
        f"Method     {adapter.method}, {run.num_matrices} matrices",
    ]
    lines.append(f"Weights    {shares_line(run.shares, run.num_matrices)}")
    if train.compile:
        lines.append("Blocks     compiled from the second step on, which memory below does not know of")
    if run.fitted is not None:
        lines.append(f"Within     {run.fitted.as_sentence()}")
    if adapter.has_adapters:
        lines.append(f"Adapters   {share(run.num_adapter_parameters)} at {adapter.size}")
    if run.num_other_trained:
        lines.append(f"Besides    {share(run.num_other_trained)} trained in full")
    if isinstance(adapter, TargetsConfig) and (schedule := run.schedule) is not None:
        fewest, most = run.final_range(adapter.init_rank)
        lines.append(f"           {share(run.num_final)} in the end, if the budget is spread evenly")
        lines.append(f"           {fewest:,} to {most:,}, wherever ranks end up")
        lines.append(
            f"Budget     {schedule.initial_budget:,} -> {schedule.target_budget:,} triplets: warm-up to step "
            f"{schedule.initial_warmup_steps:,}, an allocation every {schedule.mask_interval_steps}, frozen from step "
            f"{schedule.freeze_step + 1:,}"
        )
        made = run.allocations
        cut = len(made) > 2 * SHOWN_ALLOCATIONS
        shown = [*made[:SHOWN_ALLOCATIONS], None, *made[-SHOWN_ALLOCATIONS:]] if cut else made
        listed = ", ".join("..." if a is None else f"{a[1]:,} at {a[0]:,}" for a in shown)
        lines.append(f"           {len(made):,} allocations (triplets at step): {listed}")
    return "\n".join(lines)


def _architecture(config: RunConfig, name: str, architectures: Path) -> Any:
    from transformers import AutoConfig

    shipped = architectures / f"{name.rpartition('/')[2]}.json"
    is_shipped = shipped.is_file() and not Path(name).is_dir()
    try:
        if not is_shipped:
            refuse_code_from_elsewhere(config.model.model_copy(update={"name": name}))
        return AutoConfig.from_pretrained(
            shipped if is_shipped else name,
            **({} if is_shipped else {"revision": config.model.revision}),
            trust_remote_code=config.model.trust_remote_code,
        )
    except UserError:
        raise
    except Exception as error:  # as in load_backbone
        raise UserError(
            f"model={name!r}: its config.json cannot be had ({reason_of(error, 200)}): give a local folder, or a Hub "
            f"id that can be reached; those in {architectures} need no network"
        ) from error
