"""One function in four forms: adapted model, merged model, plain LoRA and AdaLoRA as PEFT loads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from adalora_dist.artifacts.export import merge
from adalora_dist.artifacts.peft_format import VLLM_MAX_RANKS, fold, save_adalora, save_lora, vllm_options
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.update import AdapterWeights
from tests.support.adapted_models import (
    IDS,
    MODELS,
    SETTINGS,
    STEPS,
    TOLERANCE,
    build,
    logits,
    weights_of,
    with_adapters,
)
from tests.support.engine_steps import backward_and_step
from tests.support.models import Net
from tests.support.paths import shared
from tests.support.ranks import import_deepspeed, run_ranks
from tests.support.refusals import refusal

deepspeed = import_deepspeed()


def all_forms(
    plain: Callable[[], Any],
    adapters: list[AdapterWeights],
    folder: Path,
    trained: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Logits, computed in ``dtype``, of each exported form as transformers or PEFT load it from ``folder``."""
    plain().save_pretrained(folder / "base")
    merge(adapters, folder / "base", folder / "merged", trained=trained, show_progress=False)
    save_lora(adapters, folder / "lora", str(folder / "base"), trained=trained)
    save_adalora(adapters, folder / "peft", str(folder / "base"), trained=trained)
    return {"merged": logits(type(plain()).from_pretrained(folder / "merged").to(dtype))} | {
        form: logits(PeftModel.from_pretrained(plain(), folder / form).to(dtype)) for form in ("lora", "peft")
    }


# ------------------------------------------------------------------------------------------------ the same function


@pytest.mark.parametrize("kind", MODELS)
def test_every_form_says_the_same(tmp_path: Path, kind: str) -> None:
    model = build(kind)
    with_adapters(model)
    trained = None
    if kind == "deberta":
        with torch.no_grad():
            model.classifier.weight.mul_(3)
        trained = {f"classifier.{n}": p.detach() for n, p in model.classifier.named_parameters()}
    adapters, expected = weights_of(model), logits(model)
    assert {a.rank for a in adapters} == {0, 1, 2, 3, 4}
    assert (logits(build(kind)) - expected).abs().max() > 0.05  # the adapters matter
    for form, said in all_forms(lambda: build(kind), adapters, tmp_path, trained).items():
        assert (said - expected).abs().max() <= TOLERANCE, form


def test_the_real_llama(tmp_path: Path) -> None:
    """Its logits reach 17, where a forward pass in float32 rounds by 1e-5 itself: computed in float64, of what is
    stored in float32."""
    folder = shared("models/stories260k")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with_adapters(model)
    with torch.no_grad():
        for layer in (m for m in model.modules() if hasattr(m, "Qt")):
            layer.lam.mul_(0.2)
    adapters, expected = weights_of(model), logits(model.double())
    assert (logits(AutoModelForCausalLM.from_pretrained(folder)) - expected).abs().max() > 0.05
    forms = all_forms(lambda: AutoModelForCausalLM.from_pretrained(folder), adapters, tmp_path, dtype=torch.float64)
    for form, said in forms.items():
        assert (said - expected).abs().max() <= TOLERANCE, form


# --------------------------------------------------------------------------------------- details of the two formats


def test_patterns_hit_their_own_module_alone(tmp_path: Path) -> None:
    """Layers 1 and 11, and a model inside the model whose names end as the outer one's do."""

    class Nested(Net):
        def __init__(self) -> None:
            super().__init__(num_blocks=12)
            self.tower = Net(num_blocks=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.tower(x)

    def plain() -> Nested:
        torch.manual_seed(0)
        return Nested()

    model = plain()
    with_adapters(model, ("up", "down"), ranks=(2, 0, 3, 1, 4))
    adapters, x = weights_of(model), torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    own = {a.name: a.rank for a in adapters}
    assert own["blocks.1.down"] == 1 and own["tower.blocks.1.down"] == 3 and own["blocks.1.up"] == 3
    assert own["blocks.0.down"] == 0 and own["tower.blocks.0.up"] == 4 and own["tower.blocks.0.down"] == 2
    save_lora(adapters, tmp_path / "lora", "")
    save_adalora(adapters, tmp_path / "peft", "")
    for form in ("lora", "peft"):
        loaded = PeftModel.from_pretrained(plain(), tmp_path / form).eval()
        layers = {n: m for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")}
        ranks = {
            n: len(m.lora_A["default"].weight if form == "lora" else m.lora_A["default"]) for n, m in layers.items()
        }
        assert ranks == {name: rank for name, rank in own.items() if rank or form == "peft"}
        if form == "lora":
            assert {m.scaling["default"] for m in layers.values()} == {1.0}
        with torch.no_grad():
            assert (loaded(x) - model(x)).abs().max() <= TOLERANCE
    patterns = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["rank_pattern"]
    for name in ("blocksX1Xup", "x.blocks.1.up", "blocks.1.up.x", "xblocks.1.up"):
        assert get_pattern_key(patterns, name) == name, "a key hit a module of another name"


VLLM_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""What vLLM's LLaMA takes adapters for, by the last part of a module's name, its fused matrices taken apart."""


def load_as_vllm_does(folder: Path, max_lora_rank: int) -> dict[str, torch.Tensor]:
    """Updates by module, by the rules of vLLM's LoRA loader, which cannot be installed here.

    They are read off its source: ``lora/peft_helper.py``, ``lora/lora_model.py``, ``lora/utils.py``, ``config/lora.py``
    and the buffers of ``lora/layers/``. It knows no pattern: one ``lora_alpha / r`` scales every B. Stands for "vLLM
    accepts this adapter and computes the same from it", not for its kernels.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise ValueError(f"Missing required configuration fields: {missing}")
    if config.get("modules_to_save"):
        raise ValueError("only supports modules_to_save being None")
    if config.get("use_dora"):
        raise ValueError("does not yet support DoRA")
    if config.get("bias", "none") != "none":
        raise ValueError("bias is not supported")
    if max_lora_rank not in VLLM_MAX_RANKS:
        raise ValueError("max_lora_rank is not one of its values")
    if config["r"] > max_lora_rank:
        raise ValueError("LoRA rank is greater than max_lora_rank")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = key.replace("base_model.model.", "").split(".")
        if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise ValueError(f"{key} is unsupported LoRA weight")
        if parts[-3] not in VLLM_MODULES:
            raise ValueError(f"expected target modules in {VLLM_MODULES} but received {key}")
        factors.setdefault(".".join(parts[:-2]), {})[parts[-2]] = tensor
    updates = {}
    for name, pair in factors.items():
        a, b = torch.zeros(max_lora_rank, pair["lora_A"].shape[1]), torch.zeros(len(pair["lora_B"]), max_lora_rank)
        a[: len(pair["lora_A"])] = pair["lora_A"]  # buffers of one size for all; rows beyond the module's rank stay 0
        b[:, : pair["lora_B"].shape[1]] = pair["lora_B"] * scale
        updates[name] = b @ a
    return updates


def test_vllm_would_take_the_lora_and_compute_the_same(tmp_path: Path) -> None:
    model = build("llama")
    with_adapters(model)
    adapters = weights_of(model)
    save_lora(adapters, tmp_path / "lora", "some/model", "abc")
    updates = load_as_vllm_does(tmp_path / "lora", 8)
    assert updates.keys() == {a.name for a in adapters if a.rank} != {a.name for a in adapters}
    for adapter in adapters:
        if adapter.rank:
            torch.testing.assert_close(updates[adapter.name], adapter.delta(), rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] and max(config["rank_pattern"].values()) == config["r"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", "abc")
    assert vllm_options(tmp_path / "lora") == f"--enable-lora --max-lora-rank 8 --lora-modules NAME={tmp_path}/lora"


def test_what_vllm_would_not_take(tmp_path: Path) -> None:
    """Each is said by the export, or cannot come from it; and the rules above see it."""
    model = build("llama")
    with_adapters(model)
    trained = {"lm_head.weight": model.lm_head.weight.detach()}
    save_lora(weights_of(model), tmp_path / "head", "", trained=trained)
    with pytest.raises(ValueError, match="modules_to_save"):
        load_as_vllm_does(tmp_path / "head", 8)
    assert "serve the merged model" in vllm_options(tmp_path / "head")
    save_lora(weights_of(model), tmp_path / "lora", "")
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        load_as_vllm_does(tmp_path / "lora", 1)
    path = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes, says in (({"use_dora": True}, "DoRA"), ({"bias": "all"}, "bias"), ({"r": 600}, "greater")):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=says):
            load_as_vllm_does(tmp_path / "lora", 512)
    assert "takes ranks up to 512, not 600" in vllm_options(tmp_path / "lora")
    path.write_text(json.dumps({**config, "r": None}))
    assert "r is None" in refusal(vllm_options, tmp_path / "lora")
    other = build("gpt2")
    with_adapters(other)
    save_lora(weights_of(other), tmp_path / "gpt2", "")
    with pytest.raises(ValueError, match="expected target modules"):
        load_as_vllm_does(tmp_path / "gpt2", 8)


def test_folding_is_the_nearest_update_of_that_rank() -> None:
    model = build("llama")
    with_adapters(model)
    adapters = weights_of(model)
    folded, cost = fold(adapters, 2)
    assert [f.rank for f in folded] == [min(a.rank, 2) for a in adapters]
    errors, lost, norm = [], 0.0, 0.0
    for before, after in zip(adapters, folded, strict=True):
        if before.rank <= 2:
            assert after is before
        singular = torch.linalg.svdvals(before.delta().double())
        error = (before.delta() - after.delta()).double().norm()
        torch.testing.assert_close(error, singular[2:].norm(), rtol=1e-4, atol=1e-6)
        lost, norm = lost + error**2, norm + singular.square().sum()
        errors += [(error / singular.norm()).item()] if before.rank > 2 else []
    assert cost.num_matrices == len(errors) > 2
    assert cost.largest_error == pytest.approx(max(errors), rel=1e-4)
    assert cost.total_error == pytest.approx((lost / norm).sqrt().item(), rel=1e-4)
    assert fold(adapters, 4) == (adapters, (0, 0.0, 0.0))


def test_an_adapter_of_rank_0_everywhere(tmp_path: Path) -> None:
    model = build("llama")
    with_adapters(model, ranks=(0,))
    assert "rank 0 everywhere" in refusal(save_lora, weights_of(model), tmp_path / "lora", "")
    save_adalora(weights_of(model), tmp_path / "peft", "")
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path / "peft")), logits(build("llama")))


def test_peft_trains_an_exported_adalora_further(tmp_path: Path) -> None:
    """Rank 0 included; its ranks stay as they are as long as nobody calls PEFT's update_and_allocate."""
    model = build("llama")
    with_adapters(model)
    save_adalora(weights_of(model), tmp_path / "peft", "")
    [(losses, ranks)] = run_ranks(1, train_in_peft, tmp_path / "peft")
    assert losses[-1] < losses[0] - 0.1 and ranks == {a.name: a.rank for a in weights_of(model)}


def train_in_peft(rank: int, world_size: int, folder: Path) -> tuple[list[float], dict[str, int]]:
    model = PeftModel.from_pretrained(build("llama"), folder, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_E")}
    return losses, {name: len(layer.lora_E["default"]) for name, layer in layers.items()}


# ------------------------------------------------------------------------------------------------- after real runs


def train(rank: int, world_size: int, engine: str, kind: str) -> tuple[list[AdapterWeights], torch.Tensor]:
    """A short run on this engine; the adapters gathered from it, and what the trained model itself says."""
    model: Any = build(kind)
    matrices = adapt(model, SETTINGS)
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size,))
        blocks = {type(model.get_submodule(re.match(r".*?\.\d+(?=\.)", m.name)[0])) for m in matrices}  # type: ignore[index]
        for module in [m for m in model.modules() if type(m) in blocks]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    hooks = attach(model, optimizer, SETTINGS, STEPS)
    if engine == "zero3":
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        ids = torch.randint(3, 48, (2, 6), generator=generator)
        labels = ids[:, 0] % 3 if kind == "deberta" else ids
        loss = model(input_ids=ids, labels=labels).loss
        backward_and_step(engine, model, optimizer, loss)
    hooks.finish()
    return hooks.updates(), logits(model)


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("fsdp2", "llama"),
        ("zero3", "llama"),
        *(pytest.param(e, k, marks=pytest.mark.slow) for e in ("fsdp2", "zero3") for k in ("gpt2", "bart", "deberta")),
    ],
)
def test_every_form_says_what_the_sharded_model_said(tmp_path: Path, engine: str, kind: str) -> None:
    for rank, (adapters, expected) in enumerate(run_ranks(2, train, engine, kind)):
        ranks = {a.rank for a in adapters}
        assert 0 in ranks and len(ranks) > 1 and sum(a.rank for a in adapters) == len(adapters)
        assert (logits(build(kind)) - expected).abs().max() > 0.01
        if rank == 0:
            for form, said in all_forms(lambda: build(kind), adapters, tmp_path).items():
                assert (said - expected).abs().max() <= TOLERANCE, form
