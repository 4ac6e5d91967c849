"""Recipes as users start them, and, in seconds and under any engine, as the main program of forked processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.paths import ROOT
from tests.support.ranks import free_port, run_ranks

BIN = Path(sys.executable).parent
"""Where the commands of this environment are."""

ENGINES: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
    "zero2": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs" / "zero2.json"),
    },
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs" / "zero3.json"),
    },
}  # fmt: skip


def run_recipe(
    recipe: str, num_processes: int, arguments: list[str], environment: dict[str, str] | None = None
) -> tuple[Any, str, str]:
    """(exit code, standard output, standard error) of rank 0 of ``recipes/RECIPE.py``; other ranks' codes are equal."""
    environment = {"MASTER_PORT": free_port(), **(environment or {})}
    results = run_ranks(num_processes, _run, recipe, arguments, environment)
    assert len({code for code, *_ in results}) == 1, results
    return results[0]


def run_command(
    *command: Any, folder: Path = ROOT, timeout: float = 400, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run, by default from the repository's root, as the README says, with this Python first on PATH, as in an
    activated virtual environment, and without what launchers have put into this test process's environment."""
    launchers = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "DS_ACCELERATOR", "OMP_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
    own = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**inherited, **own, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Run:
    """What a run left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts, self.results, self.pattern = (
            json.loads((folder / name).read_text()) for name in ("run.json", "results.json", "rank_pattern.json")
        )
        self.metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> torch.Tensor:
        return torch.tensor([record["loss"] for record in self.metrics])


def finished(folder: Path, process: subprocess.CompletedProcess[str]) -> Run:
    assert process.returncode == 0, process.stderr[-4000:]
    return Run(folder)


def read_json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _run(
    rank: int, world_size: int, recipe: str, arguments: list[str], environment: dict[str, str]
) -> tuple[Any, str, str]:
    dist.barrier()  # a rank that left while another still connects would break it
    dist.destroy_process_group()  # the recipe makes its own, and ends it
    os.environ.update(environment)
    path = ROOT / "recipes" / f"{recipe}.py"
    sys.argv = [str(path), *arguments]
    output, errors = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
    if not dist.is_initialized():  # run_ranks wants one
        with tempfile.NamedTemporaryFile() as rendezvous:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous.name}", rank=0, world_size=1)
    return code, output.getvalue(), errors.getvalue()
