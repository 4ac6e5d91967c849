"""The run folder: resolved configuration, versions, commit and command; a line per step and one per allocation."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from adalora_dist.artifacts.checkpoints.content import Checkpoint
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object, read_sections
from adalora_dist.io.launchers import OWN_COMMAND, launchers
from adalora_dist.io.publish import discard, open_to_append, refuse_link, write_whole, writing
from adalora_dist.io.redaction import redacted, redacted_command
from adalora_dist.io.shipped import ROOT
from adalora_dist.methods.protocol import Step
from adalora_dist.training.best import BEST
from adalora_dist.training.resume import (
    ALLOCATIONS,
    CHECKPOINTS,
    LOGS,
    METRICS,
    continues_in_place,
    refuse_lost_steps,
    set_later_aside,
)

WRITTEN = (
    *("config.yaml", "run.json", "best.json", "rank_pattern.json", "quantized.json", "verification.json"),
    *("results.json", "samples.json", "texts.json", "answers.jsonl", "predictions.json", "nbest_predictions.json"),
)
"""Files that runs write whole, those of the recipes among them: what has such a name before is somebody's."""
_PACKAGES = ("adalora-dist", "torch", "transformers", "accelerate", "datasets", "deepspeed", "bitsandbytes", "torchao")


class RunFolder:
    """Files of one run, written by the main process alone; other processes get an object that writes nothing.

    A run that continues from ``resumed`` has the metrics and the checkpoints of the steps up to there, no more and no
    less: make the folder when everything that speaks against continuing has been ruled out.

    Raises:
        UserError: the folder already holds a run and ``overwrite`` is off, or it cannot be written.
    """

    def __init__(
        self, config: RunConfig, is_main_process: bool, facts: Mapping[str, Any], resumed: Checkpoint | None = None
    ) -> None:
        self.path = Path(config.train.output_dir)
        self._metrics = None
        self._num_allocations = 0  # written so far
        if not is_main_process:
            return
        refuse_used_folder(config)
        if config.train.overwrite:  # all but the lock, which this run holds; where there is no run, what it appends to
            own = list(self.path.iterdir()) if _is_run(self.path) else map(self.path.joinpath, LOGS)
            _remove(path for path in own if not path.name.startswith(".lock"))
        if resumed is None and config.train.resume != "never":
            refuse_lost_steps(config.train)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if resumed is not None:
                for form in config.export.export_formats:  # they are made again
                    discard(self.path / form)
                (self.path / "best.json").unlink(missing_ok=True)
                set_later_aside(resumed, config.train)
                self._restore_logs(resumed)
            self._metrics = open_to_append(self.path / METRICS)
        except OSError as error:
            raise UserError(f"output_dir={self.path} cannot be written ({error}): choose another folder") from error
        first_step = {} if resumed is None else {"resumed_from": str(resumed.path), "first_step": resumed.step}
        about = {**_provenance(), **facts, **first_step, "changed_settings": _changed(config)}
        with writing(self.path):
            text = yaml.safe_dump(redacted(config.model_dump(mode="json")), sort_keys=False)
            write_whole(self.path / "config.yaml", text)
            write_whole(self.path / "run.json", json.dumps(redacted(about), indent=2) + "\n")

    def _restore_logs(self, resumed: Checkpoint) -> None:
        """Back to what was logged when the checkpoint was written, so that no step is there twice or missing."""
        for name in LOGS:
            content = resumed.read(name) if name in resumed.files else b""
            write_whole(self.path / name, content)
            if name == ALLOCATIONS:
                self._num_allocations = content.count(b"\n")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one JSON line to metrics.jsonl."""
        if self._metrics is not None:
            with writing(self.path / METRICS):
                self._metrics.write(json.dumps(record) + "\n")
                self._metrics.flush()

    def log_events(self, method_step: Step) -> None:
        """Append a JSON line to allocations.jsonl for every allocation since the last call. Reads from the device."""
        if self._metrics is None:
            return
        records = method_step.events(self._num_allocations)
        if records:
            with writing(self.path / ALLOCATIONS), open_to_append(self.path / ALLOCATIONS) as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        self._num_allocations += len(records)

    def listing(self) -> str:
        """One line for the end of the run: the folder and what is in it."""
        return f"Files in {self.path}: " + ", ".join(sorted(path.name for path in self.path.glob("[!.]*")))

    def write_lines(self, name: str, records: Sequence[Any]) -> None:
        """Write the records as JSON lines, NAME in the folder; without any, nothing."""
        if self._metrics is not None and records:
            with writing(self.path / name):
                write_whole(self.path / name, "".join(json.dumps(redacted(record)) + "\n" for record in records))

    def write_json(self, name: str, content: Any) -> None:
        """Write ``content`` as NAME in the folder."""
        if self._metrics is not None:
            with writing(self.path / name):
                write_whole(self.path / name, json.dumps(redacted(content), indent=2) + "\n")


def refuse_used_folder(config: RunConfig) -> None:
    """Raise before any work if ``output_dir`` holds a run that must not be replaced, or leads out of itself."""
    path, in_place = Path(config.train.output_dir), continues_in_place(config.train)
    with writing(path):
        holds_run = (path / "config.yaml").exists()
        taken = [name for name in WRITTEN if os.path.lexists(path / name)]
    if in_place and config.train.overwrite:
        raise UserError(
            f"overwrite would remove output_dir={path}, and with it resume={config.train.resume}: leave out one of both"
        )
    if holds_run and not config.train.overwrite and not in_place:
        raise UserError(
            f"output_dir={path} already holds a run: continue it with --resume auto, choose another --output-dir or "
            "pass --overwrite"
        )
    is_run, is_cleared = _is_run(path), config.train.overwrite
    if (holds_run if is_cleared else taken and not (path / CHECKPOINTS).is_dir()) and not is_run:
        raise UserError(
            f"output_dir={path} holds {taken[0]}, which is of no run: choose another --output-dir, or move it away"
        )
    if is_cleared:
        return
    for name in (CHECKPOINTS, BEST, "adapter", *config.export.export_formats):
        refuse_link(path / name)
    for name in LOGS:  # which are appended to
        if os.path.lexists(log := path / name) and not stat.S_ISREG(log.lstat().st_mode):
            raise UserError(f"output_dir={path}: {name} is no plain file: choose another --output-dir, or remove it")
    written = [name for name in LOGS if (path / name).exists() and (path / name).stat().st_size]
    for name in (*written, *config.export.export_formats):
        if (path / name).exists() and not in_place:
            raise UserError(f"output_dir={path} holds {name} already: choose another --output-dir, or move it away")


def _is_run(folder: Path) -> bool:
    """Whether the files that each run begins with are there: one of them may be damaged, or not have been written."""
    signs = ((read_sections, "config.yaml", "train", "output_dir"), (read_object, "run.json", "versions", "torch"))
    for read, name, section, key in signs:
        with contextlib.suppress(UserError):
            found: Any = read(folder / name).get(section)
            if isinstance(found, dict) and key in found:
                return True
    return False


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _changed(config: RunConfig) -> dict[str, Any]:
    """Sections with the settings that differ from the recipe's defaults; the method is told in any case."""
    changed = config.model_dump(mode="json", exclude_defaults=True)
    return changed | {"adapter": {"method": config.adapter.method, **changed.get("adapter", {})}}


def _launcher_command() -> list[str] | None:
    """What was typed, where that was not the recipe's own command: a launcher hands on a part of it. None without."""
    if found := launchers():
        return redacted_command(found[-1][1])
    return redacted_command(json.loads(os.environ[OWN_COMMAND])) if OWN_COMMAND in os.environ else None


def _commit() -> str | None:
    """Of the clone that this code is run from; None without one: environments lie in clones of something else, too."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError:  # images of containers mostly have no git
        return None
    return lines[1] if len(lines) == 2 and Path(lines[0]).resolve() == ROOT else None


def _provenance() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = str(torch.__version__)  # with its build, such as +cu132, which its metadata may lack
    return {
        "command": redacted_command(sys.argv),
        "launcher_command": _launcher_command(),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
