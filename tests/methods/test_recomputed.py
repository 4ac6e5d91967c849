"""Every method under the engine that keeps most of a forward, with blocks computed again: not a bit changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from adalora_dist.config.methods import METHODS
from tests.support.ranks import import_deepspeed, import_package
from tests.support.recipe_runs import ENGINES, losses_of, run_recipe
from tests.support.tiny_project import Project

import_deepspeed()
import_package()

WITH_ADAPTERS = [name for name, settings in METHODS.items() if settings.has_adapters and not settings.trains_backbone]
QUICK = ("dora", "adadora")
"""They measure in the first forward of a step what its second, in backward, finds measured."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("recomputed"))


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in WITH_ADAPTERS]
)
def test_losses_under_zero3(project: Project, tmp_path: Path, method: str) -> None:
    """DeepSpeed's linear maps keep their input even where their weight is frozen."""
    losses = []
    for how in ([], ["--gradient-checkpointing"]):
        folder = tmp_path / str(len(losses))
        words = ["--method", method, "--max-steps", "4", "--no-evaluate-before", "--export-formats", "none"]
        words += ["--evaluate-by", "likelihood", *(["--drop-layers", "1"] if method == "adapterdrop" else []), *how]
        code, _, errors = run_recipe("llama_commonsense", 2, project.arguments(folder, *words), ENGINES["zero3"])
        assert code == 0, errors
        losses.append(losses_of(folder))
    assert losses[0] == losses[1] and losses[0][0] != losses[0][-1]
