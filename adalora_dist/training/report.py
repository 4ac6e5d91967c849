"""Tables for the end of a run: accuracies, and active ranks by layer and matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adalora_dist.artifacts.tables import aligned, rank_table
from adalora_dist.config.sections import RunConfig
from adalora_dist.methods.shares import shares_line, weight_shares
from adalora_dist.sharding.tensors import class_name, full_numel
from adalora_dist.tasks.commonsense.results import TaskResult
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.training.asked_for import engine_said
from adalora_dist.training.prepared import Prepared


def run_facts(
    config: RunConfig,
    engine: str,
    num_processes: int,
    num_steps: int,
    prepared: Prepared,
    bad_rows: BadRows | None = None,
) -> dict[str, Any]:
    """What run.json says of a run beyond its configuration. The number of parameters is that of the whole model."""
    facts = {"engine": engine_said(engine), "num_processes": num_processes}
    facts |= {"num_steps": num_steps, "method": config.adapter.method}
    facts["num_trainable_parameters"] = sum(full_numel(p) for p in prepared.model.parameters() if p.requires_grad)
    model = getattr(prepared.model, "module", prepared.model)  # inside DDP and DeepSpeed
    facts["weight_shares"] = weight_shares(model)
    facts["num_rows_left_out"] = dict(bad_rows.counts) if bad_rows else {}
    facts["model_class"] = class_name(model)
    facts["base_commit"] = getattr(getattr(model, "config", None), "_commit_hash", None)  # None: a local folder
    return facts | prepared.hooks.method_step.facts()


def facts_line(facts: Mapping[str, Any], plan: str = "") -> str:
    """:func:`run_facts` in two lines for the console: the run with the method's plan, what it adapts of the model."""
    line = (
        f"{facts['engine']} on {facts['num_processes']} process(es), {facts['num_steps']} steps; method "
        f"{facts['method']}, {facts['num_trainable_parameters']:,} trainable parameters"
    )
    if "num_matrices" in facts:
        line += f", {facts['num_matrices']} matrices"
    line = f"{line}; {plan}" if plan else line
    return f"{line}\n{shares_line(facts['weight_shares'], facts.get('num_matrices', 0))}"


def accuracy_table(before: Sequence[TaskResult], after: Sequence[TaskResult]) -> str:
    """One line per task and method: rows, majority, accuracy before and after, answers that could not be parsed."""
    old = {(r.task, r.method): r for r in before}
    rows = [("task", "scored by", "rows", "majority", "before", "after", "unparsed")]
    for r in after:
        earlier = old.get((r.task, r.method))
        unparsed = "-" if r.method == "likelihood" else f"{r.num_parse_failures / r.num_rows:.1%}"
        rows.append(
            (r.task, r.method, str(r.num_rows), f"{r.majority:.1%}", f"{earlier.accuracy:.1%}" if earlier else "-",
             f"{r.accuracy:.1%}", unparsed)
        )  # fmt: skip
    return aligned(rows)


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """One line per metric, one column per occasion; a metric that an occasion lacks is a dash."""
    names = dict.fromkeys(name for scores in columns.values() for name in scores)
    rows = [("metric", *columns)]
    for name in names:
        rows.append((name, *(f"{scores[name]:.4f}" if name in scores else "-" for scores in columns.values())))
    return aligned(rows)


def rank_report(prepared: Prepared, pattern: Mapping[str, int]) -> str:
    """:func:`rank_table` of a finished run and its budget; nothing to say where ranks are fixed or there are none."""
    schedule = prepared.hooks.method_step.schedule
    if schedule is None:
        return ""
    total = f"Total rank {sum(pattern.values())}, budget {schedule.target_budget}"
    return f"\nActive ranks\n{rank_table(pattern)}\n{total}\n"
