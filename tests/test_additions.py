"""What a new method, engine, recipe and export format must touch, counted: toys of each, put into a copy and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tiny_project import write_data, write_model

LIMITS = {"method": 4, "engine": 4, "recipe": 5, "export format": 3}

METHOD = {
    "adalora_dist/config/methods/norms.py": '''
"""Settings of the toy."""

from typing import Literal

from adalora_dist.config.methods.base import MethodConfig


class NormsConfig(MethodConfig):
    """normalisation layers alone"""

    method: Literal["norms"] = "norms"
    only_last: bool = False
    """Train those of the last layer alone."""
''',
    "adalora_dist/config/methods/__init__.py": (
        "METHODS.update(\n",
        "from adalora_dist.config.methods.norms import NormsConfig\n\nMETHODS.update(\n    norms=NormsConfig,\n",
    ),
    "adalora_dist/methods/norms.py": '''
"""The toy: trains every normalisation layer."""

from adalora_dist.methods.protocol import Method


class Norms(Method):
    def adapt(self, model, generator):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return []
''',
    "adalora_dist/methods/__init__.py": (
        '"full": Full,\n',
        '"full": Full,\n    "norms": Norms,\n',
        "from adalora_dist.methods.lora import Lora\n",
        "from adalora_dist.methods.lora import Lora\nfrom adalora_dist.methods.norms import Norms\n",
    ),
}
ENGINE = {
    "adalora_dist/sharding/toy.py": '''
"""An engine that wraps the optimizer in a class of its own."""

from adalora_dist.sharding.plain import PlainEngine


class Wrapped:
    def __init__(self, optimizer):
        self.optimizer = optimizer


class ToyEngine(PlainEngine):
    @classmethod
    def claims(cls, params, optimizer):
        return isinstance(optimizer, Wrapped)
''',
    "adalora_dist/sharding/__init__.py": (
        "(ZeroEngine,",
        "(ToyEngine, ZeroEngine,",
        "from adalora_dist.sharding.zero import ZeroEngine\n",
        "from adalora_dist.sharding.toy import ToyEngine\nfrom adalora_dist.sharding.zero import ZeroEngine\n",
    ),
    "adalora_dist/config/engines.py": ('"zero2", "zero3")', '"zero2", "zero3", "toy")'),
}
FORMAT = {
    "adalora_dist/config/formats.py": (
        'Literal["merged",',
        'Literal["names", "merged",',
        '    "merged": "a whole model",\n',
        '    "merged": "a whole model",\n    "names": "the names of the matrices",\n',
    ),
    "adalora_dist/artifacts/formats.py": (
        "FORMATS: dict",
        "def _write_names(saved, folder, options):\n"
        "    folder.mkdir()\n"
        '    (folder / "names.txt").write_text("\\n".join(update.name for update in saved.adapters))\n'
        '    return ""\n\n\n'
        "FORMATS: dict",
        '    "merged": Format(',
        '    "names": Format(_write_names, is_adapter=True),\n    "merged": Format(',
    ),
    "adalora_dist/config/methods/base.py": ('frozenset({"merged", "lora",', 'frozenset({"names", "merged", "lora",'),
}
RECIPE = {
    "adalora_dist/tasks/echo/__init__.py": "",
    "adalora_dist/tasks/echo/config.py": '''
from adalora_dist.config.sections import DataConfig, RunConfig


class EchoDataConfig(DataConfig):
    num_rows: int = 12
    """Rows to make."""


class EchoConfig(RunConfig):
    data: EchoDataConfig = EchoDataConfig()
''',
    "adalora_dist/tasks/echo/rows.py": """
def echo_rows(num_rows, tokenizer):
    texts = [tokenizer(f"true false {index % 3} dog cat")["input_ids"] for index in range(num_rows)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in texts]
""",
    "recipes/echo.py": '''
"""Say it again."""

import sys

from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.tasks.echo.config import EchoConfig


def main(config):
    from transformers import AutoModelForCausalLM

    from adalora_dist.tasks.batches import BatchPlan
    from adalora_dist.tasks.echo.rows import echo_rows
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.run import Run

    run = Run(config)
    run.begin()
    tokenizer = run.load_model(AutoModelForCausalLM)
    rows = echo_rows(run.config.data.num_rows, tokenizer)
    run.prepare(BatchPlan.of_rows(rows, *run.batching))
    run.train(causal_loss(rows, padding_token(tokenizer), run.device), run.notes)
    run.export(tokenizer, rows[0]["input_ids"], 2, "an echo")
    run.finish("done")
    run.close()


if __name__ == "__main__":
    with user_errors():
        main(parse_config(EchoConfig, sys.argv[1:], __doc__))
''',
}
TOYS = {"method": METHOD, "engine": ENGINE, "recipe": RECIPE, "export format": FORMAT}
FLAGS = ("--max-steps", "6", "--batch-size", "4", "--micro-batch-size", "4", "--checkpoint-every", "3")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of package and recipes with all four toys in it, a model and data."""
    folder = tmp_path_factory.mktemp("additions")
    for part in ("adalora_dist", "recipes"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for files in TOYS.values():
        for name, change in files.items():
            path = folder / name
            if isinstance(change, str):
                assert not path.exists(), f"{name} is no new file"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(change.lstrip(), encoding="utf-8")
                continue
            text = path.read_text(encoding="utf-8")
            for old, new in zip(change[::2], change[1::2], strict=True):
                assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
                text = text.replace(old, new)
            path.write_text(text, encoding="utf-8")
    write_data(folder / "data")
    write_model(folder / "model", folder / "data")
    return folder


def run(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kind", TOYS)
def test_few_files_are_touched(kind: str) -> None:
    assert 0 < len(TOYS[kind]) <= LIMITS[kind]


def test_the_method_trains_in_an_old_recipe_and_is_exported(tree: Path) -> None:
    words = ("--model", "model", "--data", "data", "--method", "norms", "--output-dir", "runs/norms")
    done = run(tree, "recipes/llama_commonsense.py", *words, *FLAGS, "--max-length", "64")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tree / "runs/norms/run.json").read_text())["method"] == "norms"
    assert "logits differ" in done.stdout and (tree / "runs/norms/merged/config.json").exists()
    resumed = run(tree, "recipes/llama_commonsense.py", *words, *FLAGS, "--max-length", "64", "--resume", "auto")
    assert resumed.returncode == 0 and "Continuing after step 6" in resumed.stdout, resumed.stderr[-3000:]


def test_its_settings_are_its_own(tree: Path) -> None:
    shown = run(tree, "recipes/llama_commonsense.py", "--method", "norms", "--help")
    assert shown.returncode == 0 and "--only-last" in shown.stdout and "--target-rank" not in shown.stdout
    refused = run(tree, "recipes/llama_commonsense.py", "--method", "lora", "--only-last")
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 2 and "only_last (norms has)" in line


@pytest.mark.slow
def test_the_recipe_runs_and_writes_the_new_format(tree: Path) -> None:
    words = ("--model", "model", "--export-formats", "names", "merged", "--output-dir", "runs/echo", "--method", "lora")
    done = run(tree, "recipes/echo.py", *words, *FLAGS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tree / "runs/echo/names/names.txt").read_text().splitlines()) == 14
    again = run(tree, "-m", "adalora_dist", "export", "runs/echo", "--to", "names", "--out", "elsewhere")
    assert again.returncode == 0 and (tree / "elsewhere/names.txt").exists(), again.stderr[-2000:]


def test_the_engine_is_asked(tree: Path) -> None:
    program = (
        "import torch\n"
        "from adalora_dist.sharding import select_engine\n"
        "from adalora_dist.sharding.toy import Wrapped\n"
        "p = torch.nn.Parameter(torch.zeros(3))\n"
        "print(type(select_engine([p], Wrapped(torch.optim.SGD([p], lr=1)))).__name__)\n"
    )
    assert run(tree, "-c", program).stdout.strip() == "ToyEngine"
