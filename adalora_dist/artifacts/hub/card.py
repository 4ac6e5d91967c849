"""The model card of a run: everything in it is read from the run's folder, and nothing in that folder is trusted.

Names of models, settings and commands end up in code spans, in fences and in a YAML dump, so that a line break or a
bracket in one of them stays text.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from adalora_dist.artifacts.adapter_files import checked_task
from adalora_dist.artifacts.auto_classes import auto_class, label_options
from adalora_dist.artifacts.hub.files import without_tokens
from adalora_dist.artifacts.hub.metadata import Scores, metadata
from adalora_dist.artifacts.hub.pictures import draw_history, rank_pictures, read_history
from adalora_dist.artifacts.results import records_in, scores_of, subject_of
from adalora_dist.config.hub_names import is_repo_id
from adalora_dist.config.methods import DEFAULT_METHOD
from adalora_dist.io.foreign_files import read_object, read_records, read_sections
from adalora_dist.io.markdown import code, fenced, line, number, setting, table, text
from adalora_dist.io.redaction import without_folders
from adalora_dist.methods import METHODS

_SECTIONS = {"data": "Data", "adapter": "Adapters", "train": "Training", "quantization": "Quantisation"}
_NOT_SHOWN = ("output_dir", "overwrite", "log_every", "trackers")


def model_card(
    run: Path,
    export: Path | None = None,
    repo_id: str = "",
    revision: str = "main",
    base_license: str = "",
    pictures: Iterable[str] = (),
) -> str:
    """README.md of an export, with the metadata that the Hub reads.

    Args:
        run: its config.yaml and run.json are needed; results.json, rank_pattern.json, metrics.jsonl and
            verification.json are told of where they are there.
        export: the folder that is pushed; default: the run's merged model.
        repo_id: where it will be; default: the export's own folder.
        revision: branch of ``repo_id``.
        base_license: of the base model; default: ``export.base_license`` of config.yaml.
        pictures: file names beside the card, of :func:`card_pictures`.

    Raises:
        UserError: config.yaml or run.json is missing or not what a run writes.
    """
    config, facts = read_sections(run / "config.yaml"), read_object(run / "run.json")
    export = export or run / "merged"
    base, commit = _base(config, facts)
    name, before, after = text(repo_id.rpartition("/")[2] or run.resolve().name), *_results(run)
    stated = base_license or str(config.get("export", {}).get("base_license") or "")
    data = metadata(config, facts, export, base, stated, name, after)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{_said(config)} {'for' if _is_adapter(export) else 'merged into'} {code(base)}, trained with adalora-dist.",
        "## Use\n\n" + fenced(_usage(run, export, facts, base, commit, repo_id or str(export), revision), "python"),
        "## Base\n\n" + "\n".join(f"- {item}" for item in _base_items(run, export, config, base, commit, data)),
        _results_table(run, before, after),
        _ranks(run, facts, tuple(pictures)),
        *(_settings(title, config.get(section)) for section, title in _SECTIONS.items()),
        _origin(facts),
    ]
    return without_tokens("\n\n".join(part for part in parts if part) + "\n")


def _said(config: Mapping[str, Any]) -> str:
    """What the method leaves; a run from before methods were settings is AdaLoRA's."""
    method = config.get("adapter", {}).get("method", DEFAULT_METHOD)
    return METHODS[method].said if isinstance(method, str) and method in METHODS else "Adapters"


def card_pictures(run: Path) -> dict[str, bytes]:
    """ranks.svg, experts.svg where there are experts, and history.svg, of what the run has written.

    Raises:
        UserError: matplotlib is not installed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pattern = _pattern(run)
        if pattern:
            rank_pictures(pattern, folder, "svg")
        allocations = read_history(run / "allocations.jsonl")
        if allocations:
            draw_history(allocations, folder / "history.svg")
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir(), reverse=True)}


# ---------------------------------------------------------------------------------------------- what the folder says


def _is_adapter(export: Path) -> bool:
    return (export / "adapter_config.json").is_file()


def _base(config: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, str]:
    """Name of the base, and the revision it was loaded at if it is one of the Hub's. A folder goes by its last name."""
    model = config.get("model", {})
    name = str(model.get("name") or "unknown")
    is_local = facts.get("base_commit", "not recorded") is None or Path(name).exists() or not is_repo_id(name)
    return (
        (Path(without_folders(name)).name, "")
        if is_local
        else (name, str(facts.get("base_commit") or model.get("revision") or ""))
    )


# ----------------------------------------------------------------------------------------------------------- chapters


def _usage(run: Path, export: Path, facts: Mapping[str, Any], base: str, commit: str, name: str, revision: str) -> str:
    at = "" if revision == "main" else f", revision={revision!r}"
    if _is_adapter(export):
        class_name = auto_class(facts.get("model_class") or "ForCausalLM", unknown="AutoModel")
        file = run / "adapter" / "task.json"
        task = checked_task(read_object(file), str(file)) if file.is_file() else {}
        named = read_object(export / "adapter_config.json").get("base_model_name_or_path")
        labels = label_options(task, str(named or base), commit or None)
        options = (f", revision={commit!r}" if commit else "") + labels
        loaded = f"{class_name}.from_pretrained({base!r}{options})"
        return (
            f"from peft import PeftModel\nfrom transformers import {class_name}\n\n"
            f"model = PeftModel.from_pretrained({loaded}, {name!r}{at})"
        )
    class_name = auto_class((read_object(export / "config.json").get("architectures") or [""])[0], unknown="AutoModel")
    return (
        f"from transformers import {class_name}, AutoTokenizer\n\n"
        f"model = {class_name}.from_pretrained({name!r}{at})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r}{at})"
    )


def _base_items(
    run: Path, export: Path, config: Mapping[str, Any], base: str, commit: str, data: ModelCardData
) -> list[str]:
    quantization = str(config.get("quantization", {}).get("quantization") or "none")
    is_hub = data.base_model is not None
    items = [f"Model: {code(base)}" + (f", revision {code(commit) if commit else 'main'}" if is_hub else ", a folder")]
    if quantization != "none":
        items.append(f"Trained over: the base in {code(quantization)}")
    if not _is_adapter(export):
        into = "the base's own weights"
        if quantization != "none" and config.get("export", {}).get("merge_into") == "dequantized":
            into = f"the values that the base has in {code(quantization)}, not its own weights"
        items.append(f"Merged into: {into}")
        if (run / "verification.json").is_file():
            found = read_object(run / "verification.json")
            items.append(
                "Logits of the merged model in plain transformers against the trained model's: largest difference "
                f"{number(found.get('largest_logit_difference'))}, mean {number(found.get('mean_logit_difference'))}, "
                f"largest logit {number(found.get('largest_logit'))}"
            )
    is_stated = data.license != "unknown"
    stated = code(data.license_name or data.license)
    return [*items, f"Licence: {stated if is_stated else 'not stated by whoever pushed this; look it up before use'}"]


def _results(run: Path) -> tuple[Scores, Scores]:
    """Scores before and after training; none where there are no results."""
    content = read_object(run / "results.json") if (run / "results.json").is_file() else {}
    before, after = (
        {subject_of(r): scores_of(r) for r in records_in(content.get(when))} for when in ("before", "after")
    )
    return before, after


def _results_table(run: Path, before: Scores, after: Scores) -> str:
    rows = [
        {**dict(subject), "metric": text(metric), "before": _score(before.get(subject, {}).get(metric)),
         "after": _score(value)}
        for subject, scores in after.items() for metric, value in scores.items()
    ]  # fmt: skip
    return "## Results\n\n" + table(rows) + _chosen(run) if rows else ""


def _chosen(run: Path) -> str:
    """Which step's model it is, where it was chosen by a score."""
    if not (run / "best.json").is_file():
        return ""
    best = read_object(run / "best.json")
    return (
        f"\n\nThe model is that of step {number(best.get('step'))} of {number(best.get('num_steps'))}, which had the "
        f"best {text(best.get('metric'))} of all evaluations while training: {_score(best.get('score'))}."
    )


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ranks(run: Path, facts: Mapping[str, Any], pictures: Sequence[str]) -> str:
    ranks = list(_pattern(run).values())
    if not ranks:
        return ""
    parts = [
        f"{sum(ranks):,} active triplets in {len(ranks)} matrices, ranks {min(ranks)} to {max(ranks)};"
        f" {ranks.count(0)} matrices need no adapter. Trainable parameters at the start: "
        f"{number(facts.get('num_trainable_parameters'))}."
    ]
    parts += [f"![{text(Path(name).stem)}]({name})" for name in pictures]
    budgets = [record for record in read_records(run / "metrics.jsonl") if "budget" in record]
    if budgets:
        shown = sorted({round(i * (len(budgets) - 1) / 8) for i in range(9)})
        parts.append(table([{key: number(budgets[i].get(key)) for key in ("step", "budget")} for i in shown]))
    return "## Ranks\n\n" + "\n\n".join(parts)


def _pattern(run: Path) -> dict[str, int]:
    """Empty where no matrix was adapted."""
    path = run / "rank_pattern.json"
    return {name: r for name, r in read_object(path).items() if isinstance(r, int)} if path.is_file() else {}


def _settings(title: str, section: Mapping[str, Any] | None) -> str:
    shown = {key: without_folders(value) for key, value in (section or {}).items() if key not in _NOT_SHOWN}
    rows = [{"setting": text(key), "value": setting(value)} for key, value in shown.items()]
    return f"## {title}\n\n" + table(rows) if rows else ""


def _origin(facts: Mapping[str, Any]) -> str:
    parts = ["## How it was made"]
    own, launcher = facts.get("command"), facts.get("launcher_command")
    command = launcher if isinstance(launcher, list) else ["python", *own] if isinstance(own, list) else []
    if command:
        parts.append(fenced(line(shlex.join(without_folders([*map(str, command)]))), "bash"))
    shown = {
        **{"engine": "engine", "num_processes": "processes", "num_steps": "optimizer steps"},
        **{"commit": "commit of adalora-dist", "python": "Python", "platform": "platform"},
    }
    versions = facts.get("versions")
    facts = {label: facts.get(key) for key, label in shown.items()} | (versions if isinstance(versions, dict) else {})
    rows = [{"with": text(key), "value": setting(value)} for key, value in facts.items() if value is not None]
    return "\n\n".join([*parts, table(rows)] if rows else parts)
