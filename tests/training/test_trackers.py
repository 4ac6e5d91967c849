"""Runs with each tracker that is installed, real and without a network: its own files have what was logged."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from adalora_dist.config.sections import TrainConfig
from adalora_dist.training.engine import _TRACKER_INSTALLED
from adalora_dist.training.trainer_callback import AdaLoraCallback
from tests.support.ranks import run_ranks
from tests.support.recipe_runs import run_command
from tests.support.tiny_project import RECIPE, Project
from tests.support.trainer_runs import SETTINGS, STEPS, arguments, model_with_adapters, trainer_of

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


def by_trainer(rank: int, world_size: int, folder: str, tracker: str) -> None:
    os.environ.update(offline(Path(folder)) | {"TENSORBOARD_LOGGING_DIR": f"{folder}/run/logs"})
    os.chdir(folder)
    args = arguments(f"{folder}/run", 1, report_to=tracker)
    trainer_of(model_with_adapters(), args, AdaLoraCallback(SETTINGS)).train()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_trainers_trackers_get_a_histogram_of_the_ranks(tracker: str, tmp_path: Path) -> None:
    if not _TRACKER_INSTALLED[tracker]():
        pytest.skip(f"{tracker} is not installed")
    run_ranks(1, by_trainer, str(tmp_path), tracker)
    files = [path for path in tmp_path.glob(FILES[tracker]) if path.stat().st_size]
    if tracker == "wandb":
        assert any(b"train/ranks" in path.read_bytes() for path in files)
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = [EventAccumulator(str(path), {"histograms": 0}).Reload() for path in files]
    [histograms] = [found.Histograms("train/ranks") for found in events if found.Tags()["histograms"]]
    assert [event.step for event in histograms] == list(range(1, STEPS + 1))
    values = [event.histogram_value for event in histograms]
    assert {value.num for value in values} == {14}
    assert values[0].sum == 3 * 14 and values[-1].sum == 21
    [budgets] = [found.Scalars("train/budget") for found in events if "train/budget" in found.Tags()["scalars"]]
    assert [event.value for event in budgets] == [value.sum for value in values]
