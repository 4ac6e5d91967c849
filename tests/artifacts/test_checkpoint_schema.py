"""Checkpoints that are whole and wrong: the manifest vouches for them, and still the one before is taken."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adalora_dist.__main__ import main
from adalora_dist.artifacts.checkpoints import files
from adalora_dist.artifacts.checkpoints.writer import checkpoint_at, newest_checkpoint
from adalora_dist.training.resume import _check_run
from tests.support.checkpoint_faults import Run
from tests.support.refusals import refusal

SHARD = "shard-00000-of-00001.safetensors"
MATRIX, PARAMETER = "blocks.0.up", "blocks.0.up.P"

Change = Callable[[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]], Any]
"""Of state.json, spans and tensors."""


def put(*keys: Any, value: Any) -> Change:
    def change(state: dict[str, Any], spans: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        inner: Any = state
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


def drop(*keys: Any) -> Change:
    def change(state: dict[str, Any], spans: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        inner: Any = state
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return change


def span(value: Any) -> Change:
    return lambda state, spans, tensors: spans.update({PARAMETER: value})


CHANGES: dict[str, Change] = {
    **{f"without {key}": drop(key) for key in ("step", "allocator", "parameters", "triplets", "matrices", "run")},
    "step nan": put("step", value=float("nan")),
    "step as a text": put("step", value="20"),
    "step of another": put("step", value=19),
    "step as a truth": put("step", value=True),
    "allocator step 1e9": put("allocator", "step", value=10**9),
    "allocator step -1": put("allocator", "step", value=-1),
    "allocator is a list": put("allocator", value=[]),
    "more budgets than allocations": put("allocator", "allocation_budgets", value=[3]),
    "allocations backwards": lambda state, spans, tensors: state["allocator"].update(
        allocation_steps=[4, 2], allocation_budgets=[8, 8]
    ),
    "shape of texts": put("parameters", PARAMETER, "shape", value=["13", "3"]),
    "shape below 0": put("parameters", PARAMETER, "shape", value=[-13, 3]),
    "shape without end": put("parameters", PARAMETER, "shape", value=[10**18, 3]),
    "shape of a million axes": put("parameters", PARAMETER, "shape", value=[1] * 10**6),
    "optimizer step inf": put("parameters", PARAMETER, "step", value=float("inf")),
    "optimizer step nan": put("parameters", PARAMETER, "step", value=float("nan")),
    "moments are a number": put("parameters", PARAMETER, "state", value=7),
    "parameter is a number": put("parameters", PARAMETER, value=7),
    "triplets beyond the rank": put("triplets", MATRIX, value=[0, 1, 99]),
    "triplets twice": put("triplets", MATRIX, value=[0, 0, 1]),
    "triplets of another matrix": put("triplets", "other", value=[0]),
    "matrix without triplets": drop("triplets", MATRIX),
    "scale nan": put("matrices", MATRIX, "scale", value=float("nan")),
    "rank as a text": put("matrices", MATRIX, "init_rank", value="3"),
    "run is a list": put("run", value=[]),
    "span beyond the end": span([0, 10**9]),
    "span backwards": span([9, 3]),
    "span below 0": span([-1, 3]),
    "span of floats": span([0.0, 3.0]),
    "span of one": span([0]),
    "span of nothing": span(None),
    "span of a stranger": lambda state, spans, tensors: spans.update({"blocks.9.up.P": [0, 3]}),
    "weights nan": lambda state, spans, tensors: tensors[PARAMETER].fill_(float("nan")),
    "averages nan": lambda state, spans, tensors: tensors[f"sensitivity/{PARAMETER}"][0].fill_(float("nan")),
    "averages inf": lambda state, spans, tensors: tensors[f"uncertainty/{PARAMETER}"][0].fill_(float("inf")),
}


def rewrite(folder: Path, change: Change, others: dict[str, bytes] | None = None) -> None:
    """Change a checkpoint and make its manifest anew."""
    state = json.loads((folder / "state.json").read_text())
    with safe_open(folder / SHARD, framework="pt") as file:
        spans = json.loads(file.metadata()["spans"])
    tensors = load_file(folder / SHARD)
    change(state, spans, tensors)
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir()
    save_file(tensors, partial / SHARD, {"format": "pt", "spans": json.dumps(spans)})
    content = {SHARD: (partial / SHARD).read_bytes(), "state.json": json.dumps(state).encode(), **(others or {})}
    (partial / SHARD).unlink()
    files.publish(partial, [files.write_file(partial / name, data) for name, data in content.items()])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run = Run(tmp_path / "run" / "checkpoints")
    for step in (10, 20):
        run.save(step)
    return tmp_path / "run" / "checkpoints"


def test_nothing_changed_is_nothing_wrong(root: Path) -> None:
    rewrite(root / "step-00000020", lambda state, spans, tensors: None)
    found = newest_checkpoint(root)
    assert found is not None and found.step == 20


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_one_before_is_taken(root: Path, change: Change, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(root / "step-00000020", change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = newest_checkpoint(root)
    assert found is not None and found.step == 10
    [message] = [str(w.message) for w in caught]
    assert "step-00000020" in message and message.endswith("continuing from step-00000010") and len(message) < 700
    assert "step-00000020" in refusal(checkpoint_at, root / "step-00000020")
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(root / "step-00000020"), "--to", "lora", "--out", str(root.parents[1] / "out")])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1


RUN = {
    "config": {"train": {}}, "backbone": {"name": "a", "revision": None, "sha256": None}, "data": "x", "notes": {},
    "loss_scale": None,
}  # fmt: skip
LOG = b'{"loss": 1.5}\n' * 20
RUNS: dict[str, tuple[dict[str, Any], bytes]] = {
    **{f"without {key}": ({k: v for k, v in RUN.items() if k != key}, LOG) for key in RUN},
    "config is a text": (RUN | {"config": "x"}, LOG),
    "section is a list": (RUN | {"config": {"train": []}}, LOG),
    "backbone without name": (RUN | {"backbone": {}}, LOG),
    "notes are a list": (RUN | {"notes": []}, LOG),
    "loss scale nan": (RUN | {"loss_scale": {"scale": float("nan")}}, LOG),
    "metrics shorter than steps": (RUN, LOG[:-14]),
    "metrics longer": (RUN, LOG + LOG),
    "metrics without losses": (RUN, b"{}\n" * 20),
    "metrics of texts": (RUN, b'{"loss": "1"}\n' * 20),
    "metrics are no JSON": (RUN, b"x\n" * 20),
    "metrics are lists": (RUN, b"[1]\n" * 20),
    "metrics are deep": (RUN, b"[" * 100_000 + b"\n"),
    "metrics are not there": (RUN, b""),
}


@pytest.mark.parametrize(("run", "log"), RUNS.values(), ids=RUNS)
def test_a_run_that_cannot_be_continued_from_it(root: Path, run: dict[str, Any], log: bytes) -> None:
    for name, about, steps in (("step-00000010", RUN, LOG[:140]), ("step-00000020", run, log)):
        rewrite(root / name, put("run", value=about), {"metrics.jsonl": steps})
    with pytest.warns(UserWarning, match="step-00000020.*continuing from step-00000010"):
        found = newest_checkpoint(root, _check_run)
    assert found is not None and found.step == 10
