"""Run folders as reports read them, finished or not. Nothing in them is trusted: what is no number is no point."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adalora_dist.artifacts.results import Subject, records_in, scores_of, subject_of
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import parse_object, read_bytes, read_object, read_records, read_sections
from adalora_dist.io.redaction import redacted

Point = tuple[float, float]


@dataclass(frozen=True)
class Allocation:
    """One selection of triplets, from a line of allocations.jsonl."""

    step: int
    budget: int
    ranks: tuple[int, ...]
    """Active rank of each matrix, in canonical order."""
    importance: tuple[float, ...]
    """Mean score of the triplets of each matrix; empty where the run has not recorded it."""


@dataclass(frozen=True)
class RunRecord:
    """What a run has written so far."""

    path: Path
    label: str
    """Tells it from the others of a report."""
    settings: dict[str, dict[str, Any]]
    """config.yaml: the resolved configuration."""
    facts: dict[str, Any]
    """run.json: versions, command, sizes."""
    metrics: list[dict[str, Any]]
    """metrics.jsonl: one record per step."""
    allocations: list[Allocation]
    initial_ranks: dict[str, int]
    """Rank of each matrix at the start, by name in canonical order; empty without adapters whose ranks fall."""
    results: dict[str, dict[Subject, dict[str, float]]]
    """Scores by occasion (before, after, ...), subject and name."""
    samples: list[dict[str, str]]
    """Texts by what they are: prompt, in the data, before, after."""
    is_finished: bool

    @classmethod
    def read(cls, path: Path, label: str) -> RunRecord:
        """
        Raises:
            UserError: it is no run folder, or a file in it is not what a run writes.
        """
        if not (path / "config.yaml").is_file():
            why = "it has no config.yaml" if path.is_dir() else "there is no such folder"
            raise UserError(f"{path} is no run ({why}): give the output_dir of a run")
        metrics = [record for record in read_records(path / "metrics.jsonl") if _is_count(record.get("step"))]
        allocations = _allocations(path / "allocations.jsonl")
        facts = redacted(read_object(path / "run.json")) if (path / "run.json").is_file() else {}
        return cls(
            path, label, redacted(read_sections(path / "config.yaml")), facts, metrics, allocations,
            _initial_ranks(path, facts, allocations), _results(path / "results.json"), _samples(path / "samples.json"),
            (path / "results.json").is_file() or (path / "adapter" / "adapter.json").is_file(),
        )  # fmt: skip

    def points(self, name: str) -> list[Point]:
        """(step, value) of a metric, for the steps that have a finite one. Steps are counted from 1."""
        return [(r["step"] + 1, float(r[name])) for r in self.metrics if is_number(r.get(name))]

    @property
    def num_steps_done(self) -> int:
        return int(self.metrics[-1]["step"]) + 1 if self.metrics else 0

    @property
    def num_steps(self) -> int | None:
        """Of the whole run; None: not known."""
        planned = self.facts.get("num_steps")
        return planned if _is_count(planned) and planned else None

    @property
    def state(self) -> str:
        """In a few words how far it has come."""
        planned = "" if self.num_steps is None else f" of {self.num_steps:,}"
        if self.is_finished:
            return f"finished, {self.num_steps_done:,} steps"
        return f"not finished: {self.num_steps_done:,}{planned} steps so far"

    @property
    def pattern(self) -> dict[str, int]:
        """Active rank of each matrix now, by name."""
        if not self.allocations:
            return self.initial_ranks
        return dict(zip(self.initial_ranks, self.allocations[-1].ranks, strict=True))

    @property
    def importance(self) -> dict[str, float]:
        """Mean triplet score of each matrix at the last allocation that recorded it; empty where none did."""
        for allocation in reversed(self.allocations):
            if allocation.importance:
                return dict(zip(self.initial_ranks, allocation.importance, strict=True))
        return {}

    @property
    def command(self) -> str:
        """What was typed, the launcher included; "" where run.json does not say."""
        own, launcher = self.facts.get("command"), self.facts.get("launcher_command")
        words = launcher if isinstance(launcher, list) else ["python", *own] if isinstance(own, list) else []
        return shlex.join(map(str, words))

    @property
    def changed_settings(self) -> dict[str, Any] | None:
        """Settings that differ from the recipe's defaults, as SECTION.NAME; None where run.json does not say."""
        changed = self.facts.get("changed_settings")
        if not isinstance(changed, dict):
            return None
        sections = [(name, section) for name, section in changed.items() if isinstance(section, dict)]
        return {f"{name}.{key}": value for name, section in sections for key, value in section.items()}


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs in ``paths``; of a folder with one run per seed (``--seeds``), each of those.

    Raises:
        UserError: as :meth:`RunRecord.read`, or a run is given twice.
    """
    folders: list[Path] = []
    for path in paths:
        seeds = sorted(path.glob("seed_*")) if path.is_dir() and not (path / "config.yaml").is_file() else []
        folders += [seed for seed in seeds if seed.is_dir()] or [path]
    for index, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:index]]:
            raise UserError(f"{folder} is given twice: give each run once")
    labels = _labels(folders)
    return [RunRecord.read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def is_number(value: Any) -> bool:
    """A number that can be drawn, as JSON has it; the square of a larger one would be infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e100


def _is_count(value: Any) -> bool:
    """A number of steps, or of triplets."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _labels(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max((len(p) for p in parts), default=1)
    for count in range(1, longest + 1):
        labels = ["/".join(p[-count:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _allocations(path: Path) -> list[Allocation]:
    """
    Raises:
        UserError: a line is none.
    """
    found: list[Allocation] = []
    for line, record in enumerate(read_records(path), start=1):
        step, budget, ranks = record.get("step"), record.get("budget"), record.get("ranks")
        counts: list[Any] = [step, budget, *ranks] if isinstance(ranks, list) else [None]
        if not all(map(_is_count, counts)):
            raise UserError(f"{path}:{line}: step, budget and ranks must be whole numbers >= 0: remove the file")
        scores = record.get("importance")
        if not isinstance(scores, list) or len(scores) != len(counts) - 2 or not all(map(is_number, scores)):
            scores = []
        found.append(Allocation(counts[0], counts[1], tuple(counts[2:]), tuple(map(float, scores))))
        if len(found[-1].ranks) != len(found[0].ranks):
            raise UserError(f"{path}:{line}: it is about other matrices than the lines before: remove the file")
    return found


def _initial_ranks(path: Path, facts: Mapping[str, Any], allocations: Sequence[Allocation]) -> dict[str, int]:
    """From run.json; of a run that has not recorded them, from what else there is."""
    recorded = facts.get("initial_ranks")
    ranks = {k: r for k, r in recorded.items() if _is_count(r)} if isinstance(recorded, dict) else {}
    if not ranks and (file := path / "rank_pattern.json").is_file():
        ranks = {name: rank for name, rank in read_object(file).items() if _is_count(rank)}
    if allocations and len(ranks) != len(allocations[0].ranks):
        ranks = {f"matrix {k}": rank for k, rank in enumerate(allocations[0].ranks)}
    return ranks


def _results(path: Path) -> dict[str, dict[Subject, dict[str, float]]]:
    if not path.is_file():
        return {}
    occasions = {when: value for when, value in read_object(path).items() if value}
    return {
        when: {subject_of(r): {k: v for k, v in scores_of(r).items() if is_number(v)} for r in records_in(value)}
        for when, value in occasions.items()
    }


def _samples(path: Path) -> list[dict[str, str]]:
    """
    Raises:
        UserError: the file is no list of texts.
    """
    if not path.is_file():
        return []
    parsed = parse_object(b'{"samples": ' + read_bytes(path) + b"}", str(path))["samples"]  # an object has limits
    entries = [entry for entry in parsed if isinstance(entry, dict)] if isinstance(parsed, list) else []
    return [redacted({k: v for k, v in entry.items() if isinstance(v, str)}) for entry in entries]
