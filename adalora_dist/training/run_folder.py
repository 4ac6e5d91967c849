"""The run folder: resolved configuration, versions, commit and command, and one line of metrics per step."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from adalora_dist.checkpoint_content import Checkpoint
from adalora_dist.config import RunConfig
from adalora_dist.errors import UserError
from adalora_dist.training.resume import METRICS, continues_in_place

_PACKAGES = ("adalora-dist", "torch", "transformers", "accelerate", "datasets", "deepspeed", "bitsandbytes")


class RunFolder:
    """Files of one run, written by the main process alone; other processes get an object that writes nothing.

    A run that continues from ``resumed`` has the metrics of the steps up to there, no more and no less.

    Raises:
        UserError: the folder already holds a run and ``overwrite`` is off, or it cannot be written.
    """

    def __init__(
        self, config: RunConfig, is_main_process: bool, facts: Mapping[str, Any], resumed: Checkpoint | None = None
    ) -> None:
        self.path = Path(config.train.output_dir)
        self._metrics = None
        if not is_main_process:
            return
        if (self.path / "config.yaml").exists() and config.train.overwrite:
            shutil.rmtree(self.path)
        refuse_used_folder(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if resumed is not None:
                shutil.rmtree(self.path / "merged", ignore_errors=True)  # an export that was interrupted
                (self.path / "metrics.partial").write_bytes(resumed.read(METRICS))
                (self.path / "metrics.partial").replace(self.path / METRICS)
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output_dir={self.path} cannot be written ({error}): choose another folder") from error
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")
        first_step = {} if resumed is None else {"resumed_from": str(resumed.path), "first_step": resumed.step}
        about = {**_provenance(), **facts, **first_step}
        (self.path / "run.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one JSON line to metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()

    def write_json(self, name: str, content: Any) -> None:
        """Write ``content`` as NAME in the folder."""
        if self._metrics is not None:
            (self.path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_used_folder(config: RunConfig) -> None:
    """Raise before any work if ``output_dir`` holds a run that must not be replaced."""
    path, in_place = Path(config.train.output_dir), continues_in_place(config.train)
    if in_place and config.train.overwrite:
        raise UserError(
            f"overwrite would remove output_dir={path}, and with it resume={config.train.resume}: leave out one of both"
        )
    if (path / "config.yaml").exists() and not config.train.overwrite and not in_place:
        raise UserError(
            f"output_dir={path} already holds a run: continue it with --resume auto, choose another --output-dir or "
            "pass --overwrite"
        )


def _provenance() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": sys.argv,
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
