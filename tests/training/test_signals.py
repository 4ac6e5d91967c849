"""A signal at any stage of a run, Ctrl-C and a closed terminal among them: one line, one exit code, resumable."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from adalora_dist.io.ending import EXIT_PREEMPTED
from tests.support.signal_runs import (
    DOCUMENT,
    IN_TRAINING,
    STAGES,
    Outcome,
    Project,
    all_outcomes,
    document,
    documented,
    outcome_of,
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("signals"))


def check(outcome: Outcome, stage: str, world_size: int) -> None:
    assert outcome.codes == (EXIT_PREEMPTED,) * world_size, outcome
    assert len(outcome.lines) == 1, outcome
    assert (stage in IN_TRAINING) == outcome.lines[0].startswith("stopped by a signal after step "), outcome
    if stage in IN_TRAINING:  # with what was trained
        assert outcome.step and f"after step {outcome.step};" in outcome.lines[0]


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_each_stage(project: Project, stage: str) -> None:
    check(outcome_of(project, stage, signal.SIGINT, 1), stage, 1)


@pytest.mark.parametrize("stage", ["reading the data", "training"])
def test_a_closed_terminal_ends_two_processes(project: Project, stage: str) -> None:
    check(outcome_of(project, stage, signal.SIGHUP, 2), stage, 2)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_at_once(project: Project, world_size: int) -> None:
    outcome = outcome_of(project, "training", signal.SIGINT, world_size, times=2)
    assert outcome.codes == (EXIT_PREEMPTED,) * world_size
    assert outcome.lines == ("ended at once by a second Ctrl-C; run again with --resume auto",)
    assert outcome.step == 2  # what was saved before stays


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_document_is_what_happens_and_every_run_goes_on(tmp_path: Path) -> None:
    project = Project(tmp_path)
    outcomes = all_outcomes(project)
    for (stage, _, world_size), outcome in outcomes.items():
        check(outcome, stage, world_size)
    assert document(outcomes) == documented(DOCUMENT.read_text(encoding="utf-8"))
    for stage, number, world_size in outcomes:
        name = f"{stage}-{number}-{world_size}-1".replace(" ", "-")
        again = project.start(name, world_size, None, "--resume", "auto").wait()
        assert [one.code for one in again] == [0] * world_size, again[0].log
