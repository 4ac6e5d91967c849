"""Signals to a recipe at each of its stages: how its processes end, what they say, and what is left.

python -m tests.support.signal_runs        writes the table into docs/reliability.md
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adalora_dist.io.signals import SECOND_SECONDS
from adalora_dist.training.faults.guard import Guard
from tests.support.faulty_runs import Ranks, is_told_to_stop
from tests.support.limits import HANG_SECONDS, wait_until
from tests.support.paths import ROOT
from tests.support.ranks import import_package
from tests.support.settings import adapter_flags
from tests.support.tiny_project import write_data, write_model

import_package()

STAGES = {
    "before the data": ("adalora_dist.training.run", "refuse_used_folder"),
    "reading the data": ("adalora_dist.tasks.commonsense.rows", "load_tasks_and_validation"),
    "loading the model": ("adalora_dist.training.run", "load_backbone"),
    "first step": ("adalora_dist.tasks.losses", "causal_loss"),
    "training": ("adalora_dist.tasks.losses", "causal_loss"),
    "writing a checkpoint": ("adalora_dist.training.run_checkpoints", "RunCheckpoints.save"),
    "evaluation": ("adalora_dist.tasks.commonsense.choices", "evaluate_choices"),
    "export": ("adalora_dist.training.run", "export_trained"),
}
"""Where each stage is held up until the signal has come: a function that a run calls there."""
IN_TRAINING = ("first step", "training", "writing a checkpoint")
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
DOCUMENT = ROOT / "docs" / "reliability.md"
_STEPS = 6


@dataclass(frozen=True)
class Outcome:
    """How a run ended: codes of its processes, lines that tell of it, newest checkpoint's step, None without any."""

    codes: tuple[int, ...]
    lines: tuple[str, ...]
    step: int | None

    def __str__(self) -> str:
        [code] = set(self.codes)
        return f"{code}, `{self.lines[0]}`" + ("" if self.step is None else f", a checkpoint of step {self.step}")


class Project:
    """A folder with a tiny model and tiny data, for any number of runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_data(folder / "data")
        write_model(folder / "model", folder / "data")

    def start(self, name: str, world_size: int, stage: str | None, *more: str) -> Ranks:
        words = ["--model", self.folder / "model", "--data", self.folder / "data", "--output-dir", self.folder / name]
        flags = f"--max-steps {_STEPS} --batch-size 8 --max-eval-rows 2 --no-evaluate-before --checkpoint-every 2"
        own = [*map(str, words), *flags.split(), *adapter_flags(more, init_rank=3, target_rank=2), *more]
        return Ranks(world_size, self.folder / f"{name}-logs{len(more)}", run_held, self.folder / name, stage, own)


def run_held(rank: int, world_size: int, folder: Path, stage: str | None, arguments: list[str]) -> None:
    """The recipe as the main program, which waits at ``stage`` until a signal ends it or, in training, has come."""
    # As in a terminal, wherever these tests run: in the background, or behind nohup, processes begin with both ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if stage is not None:
        _hold(folder, stage, rank)
    recipe = ROOT / "recipes" / "llama_commonsense.py"
    sys.argv = [str(recipe), *arguments]
    runpy.run_path(str(recipe), run_name="__main__")


def _hold(folder: Path, stage: str, rank: int) -> None:
    module_name, name = STAGES[stage]
    owner: Any = importlib.import_module(module_name)
    while "." in name:
        first, name = name.split(".", 1)
        owner = getattr(owner, first)
    original = getattr(owner, name)
    calls, guards = iter(range(1_000_000)), _kept_guards(folder, rank)

    def wait() -> None:
        _mark(folder, f"at-{rank}").touch()
        wait_until(_mark(folder, "sent").exists)
        if stage in IN_TRAINING:  # the run goes on to the end of a step
            wait_until(lambda: is_told_to_stop(guards[-1]))
        else:  # nothing may come after the signal
            time.sleep(HANG_SECONDS)

    def held(*args: Any, **kwargs: Any) -> Any:
        if module_name.endswith("losses"):
            return _each_step(original(*args, **kwargs), 0 if stage == "first step" else 3, wait)
        # The first checkpoint is of the state before any step: there is nothing to save in it yet.
        if next(calls) == (1 if stage == "writing a checkpoint" else 0):
            wait()
        return original(*args, **kwargs)

    setattr(owner, name, held)


def _mark(folder: Path, name: str) -> Path:
    """A file beside the run's folder, by which its processes and the test tell each other how far they are."""
    return folder.with_name(f"{folder.name}-{name}")


def _kept_guards(folder: Path, rank: int) -> list[Guard]:
    """Those that are made from here on. Each leaves a mark when it has heard a signal."""
    guards: list[Guard] = []
    make, hear = Guard.__init__, Guard._on_signal

    def made(guard: Guard, *args: Any) -> None:
        guards.append(guard)
        make(guard, *args)

    def heard(guard: Guard, number: int, again: bool) -> None:
        _mark(folder, f"heard-{rank}").touch()
        hear(guard, number, again)

    Guard.__init__, Guard._on_signal = made, heard  # type: ignore[method-assign]
    return guards


def _each_step(loss_sum: Any, step: int, wait: Any) -> Any:
    calls = iter(range(1_000_000))

    def loss(*args: Any) -> Any:
        if next(calls) == step:
            wait()
        return loss_sum(*args)

    return loss


def outcome_of(project: Project, stage: str, number: int, world_size: int, times: int = 1) -> Outcome:
    """Send the signal to all processes, as a terminal does, when all are at ``stage``.

    Args:
        times: a second and further ones follow when the first has been heard, as late as a person's.
    """
    name = f"{stage}-{number}-{world_size}-{times}".replace(" ", "-")
    folder = project.folder / name
    ranks = project.start(name, world_size, stage)
    for rank in range(world_size):
        ranks.wait_for(str(Path("..") / f"{name}-at-{rank}"))
    for k in range(times):
        if k:
            for rank in range(world_size):
                ranks.wait_for(str(Path("..") / f"{name}-heard-{rank}"))
            time.sleep(2 * SECOND_SECONDS)
        for pid in ranks.pids:
            os.kill(pid, number)
    if times == 1:  # after a second one they stay where they are: a run that went on might have saved before it hears
        _mark(folder, "sent").touch()
    ended = ranks.wait()
    logs = "\n".join(one.log for one in ended)
    assert "Traceback" not in logs and "rror:" not in logs, logs
    told = tuple(line.strip() for line in logs.splitlines() if re.search("signal|Ctrl-C", line))
    found = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*[0-9]"))
    return Outcome(tuple(one.code for one in ended), told, found[-1] if found else None)


def document(outcomes: dict[tuple[str, int, int], Outcome]) -> str:
    """The table of docs/reliability.md: a row for each stage; a cell stands for all signals and numbers of processes
    that end alike."""
    lines = ["| while | SIGINT (Ctrl-C), SIGHUP, SIGTERM, on 1 and 2 processes |", "|---|---|"]
    for stage in STAGES:
        found = list(dict.fromkeys(str(outcome) for (where, *_), outcome in outcomes.items() if where == stage))
        lines.append(f"| {stage} | {'; or '.join(found)} |")
    return "\n".join(lines) + "\n"


def documented(text: str) -> str:
    """The table as it stands in a document's text."""
    found = re.search(r"(?<=<!-- tests/support/signal_runs.py -->\n)(?:\|.*\n)*", text)
    assert found is not None
    return found[0]


def all_outcomes(project: Project) -> dict[tuple[str, int, int], Outcome]:
    """By stage, signal and number of processes."""
    cases = [(stage, number, size) for stage in STAGES for size in (1, 2) for number in SIGNALS]
    return {case: outcome_of(project, *case) for case in cases}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        new = document(all_outcomes(Project(Path(name))))
    before = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(before.replace(documented(before), new), encoding="utf-8")
