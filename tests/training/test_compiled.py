"""Blocks that torch.compile has built: one graph each, few graphs in a run, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from adalora_dist.backbones.activations import checkpoint_activations
from adalora_dist.config.activations import ActivationsConfig
from adalora_dist.config.methods import METHODS
from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.build_tools import missing_build_tool
from adalora_dist.methods import method_for
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.training.compiled import compile_blocks
from adalora_dist.training.doctor import doctor
from adalora_dist.training.engine import build_accelerator
from tests.support.adapted_models import build
from tests.support.models import config
from tests.support.ranks import run_ranks
from tests.support.refusals import refused
from tests.support.resume_runs import (
    FINAL,
    STEPS,
    WORLD_SIZES,
    assert_continues_exactly,
    configuration,
    new_project,
    run,
    write_model,
)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Training:
    """A model with adapters that takes steps; ``backend``: blocks are compiled by it."""

    def __init__(self, kind: str, settings: Any, total_steps: int = 30, backend: str = "", **recomputed: Any) -> None:
        self.model = build(kind)
        adapt(self.model, settings, 0)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        self.model.train()
        checkpoint_activations(self.model, ActivationsConfig(**recomputed))
        self.optimizer = method_for(settings).optimizer(self.model, TrainConfig(learning_rate=0.01))
        self.hooks = attach(self.model, self.optimizer, settings, total_steps)
        self.hooks.detach()
        self.counted = CompileCounterWithBackend(backend)
        if backend:
            self.num_blocks = compile_blocks(self.model, self.hooks, self.counted)

    def step(self, ids: torch.Tensor) -> float:
        labels = torch.zeros(len(ids), dtype=torch.long) if self.model.config.model_type == "deberta-v2" else ids
        loss = self.model(input_ids=ids, labels=labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.hooks.replace(self.model, self.optimizer)
        return loss.item()


class Break(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x


def ids_of(number: int, rows: int = 3) -> torch.Tensor:
    return torch.randint(3, 48, (rows, 5 + 7 * number % 20), generator=torch.Generator().manual_seed(number))


def test_a_run_is_the_same_and_a_block_few_graphs() -> None:
    """With selections, and with fewer triplets in memory from the freeze on. A break in a graph would be an error."""
    settings = config("adalora", init_rank=5, target_rank=2, targets=("q_proj", "down_proj"), dropout=0.0)
    plain, built = Training("llama", settings), Training("llama", settings, backend="eager")
    losses, graphs = [], []
    for step in range(24):
        losses.append((plain.step(ids_of(step)), built.step(ids_of(step))))
        graphs.append(built.counted.frame_count)
    torch.testing.assert_close([b for _, b in losses], [a for a, _ in losses], rtol=1e-6, atol=0)
    patterns = built.hooks.rank_pattern()
    assert patterns == plain.hooks.rank_pattern() and len(set(patterns.values())) > 1
    assert graphs[0] == 0 and graphs[1] == graphs[10] == 2  # the first block's input needs no gradient
    assert 2 < graphs[-1] <= 2 + built.num_blocks
    assert [*built.model.state_dict()] == [*plain.model.state_dict()]


def test_what_cannot_be_compiled_is_refused_in_a_line() -> None:
    broken = Training("llama", config("lora", targets=("q_proj",)), backend="eager")
    broken.model.model.layers[0].mlp.act_fn = Break()
    broken.step(ids_of(0))
    with refused(r"compile true: LlamaDecoderLayer cannot be compiled as one graph \(.*\): set compile to false"):
        broken.step(ids_of(1))
    with refused("compile true: Linear does not say what its blocks are; set compile to false"):
        compile_blocks(torch.nn.Linear(2, 2), broken.hooks)
    with refused("compile true under DeepSpeed: .* set compile to false, or launch with DDP or FSDP2"):
        build_accelerator(TrainConfig(compile=True), {"ACCELERATE_USE_DEEPSPEED": "true"})


def test_a_missing_compiler_is_said_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_build_tool(on_gpu=False) == "a C++ compiler (no-such-compiler)"
    [line] = [line for line in doctor()[0].splitlines() if "--compile" in line]
    assert line.endswith(" missing: a C++ compiler (no-such-compiler)") or torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, settings in METHODS.items() if settings.compiles])
def test_methods_that_compile(method: str) -> None:
    """A step with adapters that are not at their start; a break in a graph would be an error."""
    kind = "gpt2" if method == "bitfit" else "llama"
    places = {"positions": ("down_proj",), "targets": ("all-linear",)}
    changes = {name: value for name, value in places.items() if name in METHODS[method].model_fields}
    plain, built = (Training(kind, config(method, **changes), backend=name) for name in ("", "eager"))
    for step in range(3):
        assert built.step(ids_of(step)) == pytest.approx(plain.step(ids_of(step)), rel=1e-6)
    assert built.counted.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bart", "deberta"])
def test_models_that_compile(kind: str) -> None:
    settings = config("adalora", targets=("all-linear",), dropout=0.0)
    plain, built = (Training(kind, settings, backend=name) for name in ("", "eager"))
    for step in range(3):
        assert built.step(ids_of(step)) == pytest.approx(plain.step(ids_of(step)), rel=1e-6)
    assert built.counted.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [{}, {"checkpoint_activations": 2}], ids=["full", "2"])
def test_blocks_that_are_computed_again(recomputed: dict[str, Any]) -> None:
    settings = config("adalora", init_rank=3, targets=("q_proj", "down_proj"), dropout=0.0)
    given = {"gradient_checkpointing": True, **recomputed}
    plain, built = (Training("llama", settings, backend=name, **given) for name in ("", "aot_eager"))
    for step in range(3):
        assert built.step(ids_of(step)) == pytest.approx(plain.step(ids_of(step)), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
def test_whole_runs_are_the_same_and_continue_exactly(tmp_path: Path, engine: str) -> None:
    """Built by inductor. With selections, the freeze, and steps of two micro-batches."""
    run_ranks(1, lambda rank, world_size: write_model(tmp_path))
    changes: dict[str, Any] = {"dropout": 0.0, "train_modules": ()}
    results = []
    for name, is_compiled in (("plain", False), ("built", True)):
        project = new_project(tmp_path / "model", tmp_path / name)
        settings = configuration(project, WORLD_SIZES[engine], compile=is_compiled, **changes)
        results.append(run_ranks(WORLD_SIZES[engine], run, engine, settings, timeout=1500))
    plain, built = (of_ranks[0] for of_ranks in results)
    torch.testing.assert_close(built.losses, plain.losses, rtol=1e-5, atol=0)  # rounding of 60 steps
    torch.testing.assert_close(built.losses[:5], plain.losses[:5], rtol=1e-6, atol=0)
    assert built.patterns == plain.patterns and built.state.keys() == plain.state.keys()
    project = new_project(tmp_path / "model", tmp_path / "again")
    assert_continues_exactly(project, engine, results[1], (STEPS - FINAL - 3, 0), compile=True, **changes)
