"""Runs with each tracker that is installed, real and without a network: its own files have what was logged."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from adalora_dist.config.sections import TrainConfig
from adalora_dist.training.engine import _TRACKER_INSTALLED
from tests.support.recipe_runs import run_command
from tests.support.tiny_project import RECIPE, Project

pytestmark = pytest.mark.slow

FILES = {
    "tensorboard": "run/**/events.out.tfevents.*",
    "wandb": "wandb/offline-run-*/run-*.wandb",
    "trackio": "trackio/adalora-dist.db",
    "mlflow": "mlruns/**/metrics/loss",
    "swanlab": "swanlog/**/*.swanlab",
    "comet_ml": "**/*.zip",
    "aim": "**/.aim/**/*",
    "clearml": "**/offline/*/**/*",
    "dvclive": "dvclive/plots/metrics/loss.tsv",
}
"""What a run leaves in its working folder, by tracker."""


def offline(folder: Path) -> dict[str, str]:
    """What keeps each of them in this folder, as its own documentation has it."""
    return {
        "HOME": str(folder), "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "SWANLAB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file:{folder / 'mlruns'}", "MLFLOW_ALLOW_FILE_STORE": "true",
        "CLEARML_OFFLINE_MODE": "1", "CLEARML_CACHE_DIR": str(folder / "clearml"), "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(folder), "DVC_NO_ANALYTICS": "1",
    }  # fmt: skip


def test_each_is_looked_at() -> None:
    [names] = [set(re.findall(r"'(\w+)'", str(TrainConfig.model_fields["trackers"].annotation)))]
    assert names == set(FILES) == set(_TRACKER_INSTALLED)


@pytest.mark.parametrize("tracker", FILES)
def test_a_run_is_tracked(tracker: str, tmp_path: Path) -> None:
    if not _TRACKER_INSTALLED[tracker]():
        pytest.skip(f"{tracker} is not installed")
    words = Project(tmp_path / "project").arguments(tmp_path / "run", "--trackers", tracker, "--max-steps", "4")
    words += ["--no-evaluate-before", "--export-formats", "none"]
    environment = offline(tmp_path)
    process = run_command(sys.executable, RECIPE, *words, folder=tmp_path, timeout=1500, **environment)
    assert process.returncode == 0, process.stderr[-3000:]
    found = [path for path in tmp_path.glob(FILES[tracker]) if path.is_file() and path.stat().st_size]
    assert found, sorted(os.listdir(tmp_path))
