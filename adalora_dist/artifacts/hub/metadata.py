"""What the Hub reads of a model card: its front matter. Scores count there as those of a public data set, so that only
scores on one are given; nothing names a folder of the machine that the run was on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from adalora_dist.artifacts.results import Subject
from adalora_dist.config.hub_names import is_repo_id
from adalora_dist.config.methods import DEFAULT_METHOD, is_method
from adalora_dist.io.foreign_files import read_object
from adalora_dist.io.markdown import text
from adalora_dist.tasks.commonsense.hub import HUB_TASKS
from adalora_dist.tasks.e2e.rows import HUB as E2E
from adalora_dist.tasks.glue.rows import TASKS as GLUE
from adalora_dist.tasks.glue.rows import hub_data
from adalora_dist.tasks.rows.hub import HubData
from adalora_dist.tasks.squad.rows import HUB as SQUAD
from adalora_dist.tasks.summarization.rows import TASKS as SUMMARIES

_LICENSES = frozenset(
    "apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gpl-3.0 "
    "agpl-3.0 lgpl-3.0 mpl-2.0 openrail bigscience-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m llama2 "
    "llama3 llama3.1 llama3.2 llama3.3 gemma unlicense unknown other".split()
)
"""Identifiers that the Hub's licence field takes; any other name goes into license_name."""
_PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}
"""By the end of a model's class; encoder-decoders are of a task's, below."""
_METRICS = {
    **{name: name for name in ("accuracy", "f1", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "meteor", "cider")},
    **{"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr", "exact": "exact_match"},
    **{"nist": "nist_mt", "perplexity": "perplexity"},
}
"""Scores that are metrics, as the Hub calls them; what else a record has (rows, shares, times) is none."""
PUBLIC: dict[str, HubData] = {
    **HUB_TASKS,
    **{task: hub_data(task) for task in GLUE},
    **SQUAD,
    **{task: columns.data for task, columns in SUMMARIES.items()},
    "e2e": E2E,
}
"""Data sets of the recipes, all of them English, by task."""

Scores = Mapping[Subject, Mapping[str, float]]
"""Of each subject."""


def metadata(
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    export: Path,
    base: str,
    base_license: str,
    name: str,
    results: Scores,
) -> ModelCardData:
    """The front matter.

    Args:
        config, facts: the run's config.yaml and run.json.
        export: the folder that is pushed.
        base: the base model's name; a folder's has no slash.
        name: of the model.
        results: scores after training.
    """
    is_adapter, is_known = (export / "adapter_config.json").is_file(), base_license.lower() in _LICENSES
    method = config.get("adapter", {}).get("method")
    public = _public(config)
    pipeline = _pipeline(facts, export, is_adapter, public)
    scores = [score for about, found in results.items() for score in _scores(about, found, public, pipeline)]
    return ModelCardData(
        base_model=base if "/" in base else None,
        base_model_relation="adapter" if is_adapter else "finetune",
        datasets=list(dict.fromkeys([*(data.path for data in public.values()), *_sources(config)])) or None,
        eval_results=scores or None,
        language="en" if public else None,
        library_name="peft" if is_adapter else "transformers",
        license=base_license.lower() if is_known else "other" if base_license else "unknown",
        license_name=None if is_known or not base_license else text(base_license),
        metrics=list(dict.fromkeys(score.metric_type for score in scores)) or None,
        model_name=text(name) if scores else None,
        pipeline_tag=pipeline,
        tags=["adalora-dist", method if is_method(method) else DEFAULT_METHOD],
    )


def _public(config: Mapping[str, Any]) -> dict[str, HubData]:
    """Public data sets that the run has trained on, by task; none where its data was anything else."""
    data = config.get("data", {})
    if data.get("source") != "hub":
        return {}
    listed = data.get("tasks", [data.get("task", "e2e")]) or list(HUB_TASKS)
    tasks = listed if isinstance(listed, list) else []
    return {task: PUBLIC[task] for task in tasks if isinstance(task, str) and task in PUBLIC}


def _sources(config: Mapping[str, Any]) -> list[str]:
    """Hub ids among the sources of the recipe for one's own texts."""
    sources = config.get("data", {}).get("source")
    listed = sources if isinstance(sources, list) else []
    words = [source.partition("=")[0] for source in listed if isinstance(source, str)]
    names = [word.split(":")[1] for word in words if re.match(r"hub:[^:]+", word)]
    return [name for name in names if is_repo_id(name)]


def _pipeline(facts: Mapping[str, Any], export: Path, is_adapter: bool, public: Mapping[str, HubData]) -> str | None:
    """The Hub's word for what the model does; None where nobody can tell."""
    architectures = [] if is_adapter else read_object(export / "config.json").get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else str(facts.get("model_class"))
    if set(public) & set(SUMMARIES):
        return "summarization"
    return next((pipeline for end, pipeline in _PIPELINES.items() if name.endswith(end)), None)


def _scores(
    subject: Subject, scores: Mapping[str, float], public: Mapping[str, HubData], pipeline: str | None
) -> list[EvalResult]:
    about = dict(subject)
    task = about.get("task", next(iter(public), ""))
    if task not in public or pipeline is None:
        return []
    data, rows = public[task], about.get("rows")
    by = f" ({about['method']})" if "method" in about else ""
    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=data.path,
            dataset_name=task,
            dataset_config=data.name,
            dataset_args={"rows": rows} if rows else None,
            metric_type=_METRICS[metric],
            metric_name=f"{metric}{by}",
            metric_value=round(float(value), 6),
        )
        for metric, value in scores.items()
        if metric in _METRICS
    ]
