"""Training that starts with an adapter of PEFT's: the same function, then ranks that adapt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adalora_dist.artifacts.peft_format import save_adalora, save_lora
from adalora_dist.backbones.load import load_backbone
from adalora_dist.config.sections import ModelConfig
from adalora_dist.methods import method_for
from adalora_dist.methods.adalora.start import _VARIANTS
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.protocol import adapters_of, trained_parameters
from adalora_dist.methods.update import AdapterWeights
from tests.support.adapted_models import IDS, TOLERANCE, build, logits, weights_of, with_adapters
from tests.support.expert_models import loss_of, mixture
from tests.support.ranks import run_ranks
from tests.support.refusals import refusal
from tests.support.settings import adapter_section

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bart": ["q_proj", "fc1"]}


def from_peft(kind: str, config: LoraConfig, folder: Path) -> torch.Tensor:
    """Write an adapter with PEFT itself, all of its tensors random; what it says."""
    model = get_peft_model(build(kind), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    said = logits(PeftModel.from_pretrained(build(kind), folder))
    assert (said - logits(build(kind))).abs().max() > 0.05
    return said


def start(folder: Path, kind: str = "llama", **changes: Any) -> Any:
    values = {
        "targets": tuple(TARGETS.get(kind, ["all-linear"])),
        "init_rank": 6,
        "alpha": 9,
        "start": "paper",
    } | changes
    model = build(kind)
    adapt(model, adapter_section(init_from=str(folder), **values))
    return model.eval()


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "h.1.attn.c_attn": 5}, "alpha_pattern": {"0.*": 3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_lora_as_the_start(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    said = from_peft(kind, LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS[kind], **options), tmp_path)
    model = start(tmp_path, kind)
    assert (logits(model) - said).abs().max() <= TOLERANCE
    for layer in adapters_of(model):
        rank = int((layer.lam != 0).sum())
        assert 0 < rank < 6 and layer.lam[:rank].diff().max() <= 0 and layer.lambdas.lam.requires_grad
        for factor in (layer.P, layer.Qt):  # ready for the regulariser
            torch.testing.assert_close(factor[:, :rank].T @ factor[:, :rank], torch.eye(rank), rtol=0, atol=1e-5)
            assert factor[:, rank:].abs().min() > 0  # the others as always: they can grow


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]])
def test_lora_of_experts_as_the_start(tmp_path: Path, kind: str, parameters: list[str]) -> None:
    """Written by PEFT, of one stack of a layer or of both, beside a linear map; then written here, and read again."""
    options: dict[str, Any] = {"target_parameters": parameters, "rank_pattern": {".*down_proj": 3}, "lora_alpha": 5}
    model = get_peft_model(mixture(kind).eval(), LoraConfig(r=2, target_modules=["q_proj"], **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    expected, before = loss_of(model), loss_of(mixture(kind).eval())
    assert (expected - before).abs() > 1e-3
    model.save_pretrained(tmp_path / "theirs")
    section = {"targets": ("experts", "q_proj"), "init_rank": 4, "alpha": 9, "start": "paper"}
    ours = mixture(kind).eval()
    adapters = adapt(ours, adapter_section(init_from=str(tmp_path / "theirs"), **section))
    assert (loss_of(ours) - expected).abs() < 1e-5
    for layer in adapters:
        size = 3 if layer.name.endswith("down_proj") else 2 if layer.name.endswith("q_proj") or parameters[1:] else 0
        assert (layer.lam.view(-1, 4) != 0).sum(1).eq(size).all()

    whole = trained_parameters(ours)
    updates = method_for(adapter_section(**section)).updates(
        {a.name: a.description() for a in adapters}, {a.name: a.held() for a in adapters}, None, whole.get
    )
    save_lora([u for u in updates if isinstance(u, AdapterWeights)], tmp_path / "ours", None, model=mixture(kind))
    again = mixture(kind).eval()
    adapt(again, adapter_section(init_from=str(tmp_path / "ours"), method="lora", **section | {"start": None}))
    assert (loss_of(again) - expected).abs() < 1e-5
    line = refusal(adapt, mixture(kind), adapter_section(init_from=str(tmp_path / "theirs"), **section | {
        "targets": ("q_proj",)}))  # fmt: skip
    assert "experts.0.down_proj" in line and "not among the targets" in line
    line = refusal(adapt, mixture(kind), adapter_section(init_from=str(tmp_path / "theirs"), **section | {
        "init_rank": 2}))  # fmt: skip
    assert "has rank 3 at" in line and "set init_rank to at least 3" in line


def test_lora_as_the_start_of_lora(tmp_path: Path) -> None:
    said = from_peft("llama", LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS["llama"]), tmp_path)
    model = start(tmp_path, method="lora")
    assert (logits(model) - said).abs().max() <= TOLERANCE
    assert all(m.lam.eq(1).all() and not m.lambdas.lam.requires_grad for m in adapters_of(model))


def test_lora_as_the_start_of_what_starts_as_lora(tmp_path: Path) -> None:
    said = from_peft("llama", LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS["llama"]), tmp_path)
    model = start(tmp_path, start="matched")
    assert (logits(model) - said).abs().max() <= TOLERANCE
    for layer in adapters_of(model):
        assert layer.lam.eq(1).all() and layer.lambdas.lam.requires_grad
        assert (layer.P[:, :4].abs().max(dim=0).values > 0).all() and (layer.P[:, 4:] == 0).all()


def test_adalora_as_the_start(tmp_path: Path) -> None:
    """PEFT's own file, and one that this project has written, with rank 0."""
    config = AdaLoraConfig(init_r=5, target_r=2, total_step=10, lora_alpha=7, target_modules=TARGETS["llama"])
    said = from_peft("llama", config, tmp_path / "theirs")
    assert (logits(start(tmp_path / "theirs")) - said).abs().max() <= TOLERANCE

    model = build("llama")
    with_adapters(model)
    save_adalora(weights_of(model), tmp_path / "ours", "")
    save_lora(weights_of(model), tmp_path / "lora", "")
    for form in ("ours", "lora"):
        again = start(tmp_path / form, targets=("all-linear",), init_rank=4)
        assert (logits(again) - logits(model)).abs().max() <= TOLERANCE
        ranks = {m.name: int((m.lam.abs() > 1e-9).sum()) for m in adapters_of(again)}
        assert ranks == {a.name: a.rank for a in weights_of(model)} and 0 in ranks.values()


def prune_in_peft(rank: int, world_size: int, folder: Path) -> torch.Tensor:
    """An AdaLoRA that PEFT itself has trained and pruned; what it says when PEFT has loaded it again."""
    config = AdaLoraConfig(
        init_r=5, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=8, lora_alpha=7, target_modules=TARGETS["llama"]
    )
    model = get_peft_model(build("llama"), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(8):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(build("llama"), folder))


def test_adalora_pruned_by_peft_as_the_start(tmp_path: Path) -> None:
    """Its file has a rank pattern, and factors of that many rows; PEFT goes on dividing by the initial rank."""
    [said] = run_ranks(1, prune_in_peft, tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()}
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 2 * len(ranks)
    assert (said - logits(build("llama"))).abs().max() > 0.05
    model = start(tmp_path)
    assert (logits(model) - said).abs().max() <= TOLERANCE
    assert {m.name: int((m.lam != 0).sum()) for m in adapters_of(model)} == {name: rank for name, rank in ranks.items()}


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base_alone(tmp_path: Path, init: str) -> None:
    config = LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS["llama"], init_lora_weights=init)  # type: ignore[arg-type]
    said = from_peft("llama", config, tmp_path)
    assert (logits(start(tmp_path)) - said).abs().max() <= TOLERANCE


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_the_base(tmp_path: Path, init: str) -> None:
    """PEFT takes the start out of the base's weights whenever it loads one, so its factors alone are another model."""
    config = LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS["llama"], init_lora_weights=init)  # type: ignore[arg-type]
    said = from_peft("llama", config, tmp_path)
    assert f"init_lora_weights='{init}'" in refusal(lambda: start(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": True}))
    assert (logits(start(tmp_path)) - said).abs().max() > 0.01  # what taking it for plain LoRA would have given


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    """transformers would load its base, wrapped, and adapters would go around adapters."""
    from_peft("llama", LoraConfig(r=4, target_modules=TARGETS["llama"]), tmp_path)
    line = refusal(load_backbone, ModelConfig(name=str(tmp_path)), AutoModelForCausalLM)
    assert line.startswith("model=") and "as init_from" in line


def test_what_cannot_be_started_from(tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], **changes: Any) -> str:
        folder = tmp_path / name
        from_peft("llama", LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS["llama"]), folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        change(config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        message = refusal(lambda: start(folder, **changes))
        assert message.startswith("init_from=")
        return message

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert "not among the targets" in broken("targets", lambda c, t: None, targets=("q_proj",))
    assert "init_rank to at least 4" in broken("rank", lambda c, t: None, init_rank=3)
    assert "DoRA" in broken("dora", lambda c, t: c.update(use_dora=True))
    for field, name in _VARIANTS.items():
        line = broken(field, lambda c, t, field=field: c.update({field: [1]}))  # type: ignore[misc]
        assert name in line and field in line
    assert "loftq" in broken("loftq", lambda c, t: c.update(init_lora_weights="loftq"))
    assert "['gaussian']" in broken("init", lambda c, t: c.update(init_lora_weights=["gaussian"]))
    assert "bias='all'" in broken("bias", lambda c, t: c.update(bias="all"))
    assert "IA3" in broken("ia3", lambda c, t: c.update(peft_type="IA3"))
    assert "lm_head" in broken("head", lambda c, t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)}))
    assert "other factor" in broken("half", lambda c, t: t.pop(first.replace("lora_A", "lora_B")))
    assert "different ranks" in broken("ranks", lambda c, t: t.update({first: t[first][:2].clone()}))
    assert "gives" in broken("config", lambda c, t: c.update(r=3))
    assert "16 x 24" in broken("shape", lambda c, t: t.update({first: torch.zeros(4, 24)}))
    assert "adapter_config.json" in refusal(lambda: start(tmp_path / "nowhere"))
    from_peft("llama", LoraConfig(r=4, target_modules=TARGETS["llama"]), tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "adapter_model.bin")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(lambda: start(tmp_path / "pickled"))
