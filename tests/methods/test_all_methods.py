"""What every method promises, by one table: the same losses on every engine, exact resume on another, equal exports."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from adalora_dist.artifacts.checkpoints.content import load_checkpoint
from adalora_dist.artifacts.checkpoints.writer import CheckpointWriter, checkpoint_at
from adalora_dist.artifacts.export import load_adapter, merge, read_adapter, save_adapter
from adalora_dist.config.methods import MethodConfig, method_config
from adalora_dist.config.sections import QuantizationConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import METHODS
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt, parameter_groups
from adalora_dist.methods.protocol import others_trained, trained_parameters
from tests.support import quantized_runs
from tests.support.engine_steps import backward_and_step, shard_blocks, wrapped
from tests.support.models import global_batch, net_for
from tests.support.quantized_runs import Case, needs_torchao, write_llama
from tests.support.ranks import import_deepspeed, run_ranks
from tests.support.support_matrix import may
from tests.support.tiny_language_model import logits, tiny_gpt2, tiny_llama

deepspeed = import_deepspeed()

SETTINGS: dict[str, dict[str, Any]] = {
    "lora_fa": {"init_rank": 3, "alpha": 6},
    "dora": {"init_rank": 3, "alpha": 6},
    "adadora": {
        "init_rank": 3,
        "target_rank": 1.5,
        "alpha": 6,
        "start": "paper",
        "init": "orthonormal",
        "initial_warmup_steps": 1,
        "final_steps": 2,
        "mask_interval_steps": 2,
    },
    "vera": {"init_rank": 5},
    "dvora": {"init_rank": 5},
    "hydra": {"init_rank": 3, "sequential_rank": 2},
    "dylora": {"init_rank": 4, "alpha": 3, "frozen": "algorithm"},
    "houlsby": {"bottleneck_size": 5, "bottleneck_init": "zero"},
    "pfeiffer": {"bottleneck_size": 5, "bottleneck_init": "zero"},
    "adapterdrop": {"bottleneck_size": 5, "bottleneck_init": "zero", "drop": "random", "drop_layers": 1},
    "series": {"bottleneck_size": 5, "bottleneck_init": "zero", "side": "before"},
    "parallel": {"bottleneck_size": 5, "bottleneck_init": "zero"},
    "bitfit": {"train_norms": True},
}
"""Of each method; those with adapters get ``targets`` besides."""
VARIANTS_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_fa projected": ("lora_fa", {"init_rank": 3, "alpha": 6, "projected": True}),
    "prefix": ("prefix", {"prefix_length": 3, "train_modules": ("head",)}),
    "prefix projected": ("prefix", {"prefix_length": 4, "prefix_hidden_size": 16, "train_modules": ("head",)}),
    "lora": ("lora", {"init_rank": 3, "alpha": 6}),
    "head": ("head", {"train_modules": ("head",)}),
    "full": ("full", {}),
}
"""More rows for losses and resume: what does something else at every step; a prefix, whose start changes the model; and
methods whose exports have tests of their own."""
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
MOVES = (("fsdp2", "zero3"), ("zero3", "ddp"), ("zero2", "fsdp2"))
STEPS, STOP, GLOBAL_BATCH = 8, 4, 24


def section(row: str, **changes: Any) -> MethodConfig:
    method, settings = VARIANTS_OF.get(row) or (row, SETTINGS[row])
    return method_config(method, **{**settings, **changes})


def run(
    rank: int, world_size: int, method: str, engine: str, save: Path | None = None, resume: Path | None = None
) -> list[float]:
    """Losses of the steps made: all, or those after ``resume``; with ``save`` a checkpoint is written on the way."""
    torch.manual_seed(0)
    settings = section(method)
    if settings.has_adapters and settings.method != "prefix":
        where = "targets" if "targets" in type(settings).model_fields else "positions"
        settings = section(method, **{where: ("up", "down")})
    model = net_for(settings)
    adapt(model, settings, seed=3)
    if engine == "fsdp2":
        shard_blocks(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings, 2e-2), lr=2e-2, weight_decay=0.1)
    hooks = attach(model, optimizer, settings, STEPS)
    plain = model
    model, around = wrapped(engine, model, optimizer, GLOBAL_BATCH // world_size)
    parameters = trained_parameters(plain)
    hooks.bind(around)
    first = 0
    if resume is not None:
        checkpoint = checkpoint_at(resume)
        load_checkpoint(checkpoint, parameters, around, hooks)
        first = checkpoint.step
    losses = []
    for step in range(first, STEPS):
        x, y = (t.chunk(world_size)[rank] for t in global_batch(step, GLOBAL_BATCH))
        loss = (model(x) - y).square().mean()
        backward_and_step(engine, model, optimizer, loss)
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        losses.append(mean.item())
        if save is not None and step + 1 == STOP:
            CheckpointWriter(save, 1).save(STOP, parameters, around, hooks, {})
    hooks.finish()
    return losses


def test_the_table_has_every_method_beside_those_that_have_tests_of_their_own() -> None:
    others = {"adalora", "lora", "head", "full", "galore", "relora", "low_rank", "prefix"}
    assert {*SETTINGS} == {*METHODS} - others
    assert {method for method, _ in VARIANTS_OF.values()} <= {*METHODS}
    said = [METHODS[name].said for name in (*SETTINGS, "prefix")]
    assert len({*said}) == len(said) and all("arxiv.org" in text for text in said)


def run_all(
    rank: int, world_size: int, engine: str, save: Path | None = None, resume: Path | None = None
) -> dict[str, list[float]]:
    """:func:`run` of one method after another, in folders of their own."""
    losses = {}
    for method in (*SETTINGS, *VARIANTS_OF):
        checkpoint = None if resume is None else next((resume / method).glob("step-*"))
        losses[method] = run(rank, world_size, method, engine, save and save / method, checkpoint)
    return losses


class Runs:
    """All methods trained on an engine, in one launch of ranks for all of them, when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @functools.cache  # noqa: B019 (one object, as long as the module)
    def unbroken(self, engine: str) -> list[dict[str, list[float]]]:
        """Losses of every rank by method; a checkpoint is written on the way."""
        return run_ranks(1 if engine == "single" else 2, run_all, engine, self._folder / engine, timeout=600)

    @functools.cache  # noqa: B019
    def continued(self, start: str, then: str) -> list[dict[str, list[float]]]:
        """The same after that checkpoint."""
        self.unbroken(start)
        return run_ranks(2, run_all, then, None, self._folder / start, timeout=600)

    def alone(self, method: str) -> list[float]:
        """The unbroken run in one process."""
        [losses] = self.unbroken("single")
        return losses[method]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("method", [*SETTINGS, *VARIANTS_OF])
def test_losses_are_those_of_one_process(method: str, runs: Runs) -> None:
    alone = runs.alone(method)
    assert alone[-1] < alone[0]
    for engine in ENGINES:
        for losses in runs.unbroken(engine):
            assert losses[method] == pytest.approx(alone, rel=1e-5), engine


@pytest.mark.parametrize("method", [*SETTINGS, *VARIANTS_OF])
def test_a_run_goes_on_elsewhere_as_if_it_had_not_stopped(method: str, runs: Runs) -> None:
    for start, then in MOVES:
        for losses in runs.continued(start, then):
            assert losses[method] == pytest.approx(runs.alone(method)[STOP:], rel=1e-5), (start, then)


# ------------------------------------------------------------------------------- as recipes load, prepare and train it

VARIANTS: dict[str, dict[str, bool]] = {
    "ddp": {"evaluate_first": True},
    "fsdp2": {"gradient_checkpointing": True, "evaluate_first": True},
    "zero2": {"gradient_checkpointing": True},
    "zero3": {"evaluate_first": True},
}
"""Of recipes' settings each engine gets some."""


SLOW = ("adadora", "hydra", "dylora", "houlsby", "pfeiffer", "adapterdrop", "series", "parallel", "lora_fa", "dvora")
"""Nothing that they do has to do with a backbone's files, or with how it is quantised, but what the others do, too:
dora reads the backbone's weights, vera makes matrices of a seed."""


@pytest.mark.parametrize("quantization", ["none", "nf4", pytest.param("fp8", marks=[pytest.mark.slow, needs_torchao])])
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SETTINGS if name != "bitfit"],
)
def test_over_a_backbone_from_files(method: str, quantization: str, tmp_path: Path) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    adapter, folder = section(method), write_llama(tmp_path)
    [expected] = run_ranks(1, quantized_runs.run, Case(method=quantization, adapter=adapter), folder)
    assert expected.losses[-1] < expected.losses[0]
    for engine in VARIANTS:
        case = Case(engine, quantization, adapter=adapter, **VARIANTS[engine])
        for found in run_ranks(2, quantized_runs.run, case, folder):
            assert found.losses == pytest.approx(expected.losses, rel=2e-5), engine
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-4)


def made_again(method: str, again: bool) -> list[float]:
    """Losses on one process, with activations that are kept or made again in backward."""
    torch.manual_seed(0)
    model, settings = tiny_llama(30), section(method)
    adapt(model, settings, seed=3)
    if again:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, settings, 1e-2), lr=1e-2)
    hooks = attach(model, optimizer, settings, STEPS)
    ids = torch.arange(2, 26).view(2, 12)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    hooks.finish()
    return losses


@pytest.mark.parametrize("method", SETTINGS)
def test_activations_made_again(method: str) -> None:
    """What a forward keeps for itself, norms for instance, must not be what its second run does without."""
    losses = made_again(method, True)
    assert losses == pytest.approx(made_again(method, False), rel=1e-5) and losses[-1] < losses[0]


OVER_INT8 = [name for name in SETTINGS if may(name, quantization=QuantizationConfig(quantization="int8"))]


def over_int8(rank: int, world_size: int, engine: str, folder: Path) -> dict[str, list[float]]:
    """Losses of each method in turn."""
    cases = {name: Case(engine, "int8", adapter=section(name)) for name in OVER_INT8}
    return {name: quantized_runs.run(rank, world_size, case, folder).losses for name, case in cases.items()}


@pytest.mark.slow
def test_over_int8_or_refused(tmp_path: Path) -> None:
    """Inputs are rounded to int8, too, and a last bit decides how: processes differ by more than in other types."""
    pytest.importorskip("bitsandbytes")
    assert {*SETTINGS} - {*OVER_INT8} == {"dora", "adadora", "dvora", "bitfit"}
    folder = write_llama(tmp_path)
    [alone] = run_ranks(1, over_int8, "single", folder, timeout=900)
    for losses in run_ranks(2, over_int8, "ddp", folder, timeout=900):
        for name, expected in alone.items():
            assert expected[-1] < expected[0] and losses[name] == pytest.approx(expected, rel=2e-2), name


# ------------------------------------------------------------------------------------------------------------- exports


def llama_of_small_logits() -> Any:
    """Up to about 3, as GPT-2's; they would be 12, of which float32 rounds the fifth digit behind the point."""
    model = tiny_llama(40)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)
    return model


MODELS = {"gpt2": tiny_gpt2, "llama": llama_of_small_logits}


def exported(rank: int, world_size: int, method: str, kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """Four steps, then every way in which the model can be put together again, by its logits."""
    model: Any = MODELS[kind]()
    model.save_pretrained(folder / "base")
    settings = section(method)
    plain = logits(model)
    adapt(model, settings, seed=1)
    start = logits(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings, 5e-2), lr=5e-2)
    hooks = attach(model, optimizer, settings, 4)
    tokens = torch.arange(3, 15)[None]
    for _ in range(4):
        model(input_ids=tokens, labels=tokens.flip(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hooks.finish()
    updates = hooks.updates()
    trained = {name: p.detach() for name, p in others_trained(model)}
    found = {"plain": plain, "start": start, "trained": logits(model)}
    merges = "merged" in settings.formats
    if merges:
        merge(updates, folder / "base", folder / "merged", trained=trained, show_progress=False)
        found["merged"] = logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    if updates:
        save_adapter(updates, folder / "adapter", str(folder / "base"), None)
        loaded: Any = MODELS[kind]()
        load_adapter(loaded, folder / "adapter")
        found["loaded"] = logits(loaded)
    if not merges:
        with pytest.raises(UserError, match="load_adapter"):
            merge(read_adapter(folder / "adapter").adapters, folder / "base", folder / "again", show_progress=False)
        assert not (folder / "again").exists()
    elif updates:
        merge(read_adapter(folder / "adapter").adapters, folder / "base", folder / "again", show_progress=False)
        found["merged from the folder"] = logits(AutoModelForCausalLM.from_pretrained(folder / "again"))
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name == "adadora" else []) for name in SETTINGS]
)
def test_what_is_exported_says_the_same(method: str, kind: str, tmp_path: Path) -> None:
    [found] = run_ranks(1, exported, method, kind, tmp_path)
    plain, start, trained = (found.pop(name) for name in ("plain", "start", "trained"))
    assert (start - plain).abs().max() < 1e-5 and (trained - plain).abs().max() > 0.05
    for name, again in found.items():
        assert (again - trained).abs().max() <= 1e-5, name
