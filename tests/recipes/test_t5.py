"""A T5 end to end: it asks for its weights' types, has no end of positions, and is its own backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import T5ForConditionalGeneration

from tests.support.ranks import import_package
from tests.support.recipe_runs import ENGINES, losses_of, read_json, run_recipe
from tests.support.summarization_runs import arguments
from tests.support.tiny_text_project import IDS, write_summarization, write_t5

import_package()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    write_summarization(folder)
    write_t5(folder)
    return folder


@pytest.fixture(scope="module")
def single(project: Path) -> Path:
    code, output, errors = run_recipe("summarize_bart", 1, arguments(project, project / "single"))
    assert code == 0, errors
    assert "adapted 32 matrices = " in output and "; not adapted: embeddings " in output
    return project / "single"


def test_a_t5_learns_and_its_merged_model_is_the_trained_one(single: Path) -> None:
    losses = losses_of(single)
    assert losses[-1] < losses[0]
    verification = read_json(single, "verification.json")
    assert verification["largest_logit_difference"] < 1e-3 * verification["largest_logit"]
    shares = read_json(single, "run.json")["weight_shares"]
    merged = T5ForConditionalGeneration.from_pretrained(single / "merged")
    assert sum(shares.values()) == sum(p.numel() for p in merged.parameters())
    assert merged.config.pad_token_id == IDS["pad_token_id"]


@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero2", "zero3"))])
def test_two_processes_do_what_one_does(project: Path, single: Path, engine: str) -> None:
    folder = project / engine
    code, _, errors = run_recipe("summarize_bart", 2, arguments(project, folder), ENGINES[engine])
    assert code == 0, errors
    assert losses_of(folder) == pytest.approx(losses_of(single), rel=1e-4)
    assert read_json(folder, "rank_pattern.json") == read_json(single, "rank_pattern.json")
    assert read_json(folder, "run.json")["weight_shares"] == read_json(single, "run.json")["weight_shares"]
    assert read_json(folder, "verification.json")["largest_logit_difference"] < 1e-3
