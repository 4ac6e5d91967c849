"""What a run over experts leaves: merged models, adapter folders, PEFT's form; each computes what was trained."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from adalora_dist import AdaLoraConfig, adapt, attach
from adalora_dist.artifacts.export import load_adapter, merge, read_adapter, save_adapter, task_settings
from adalora_dist.artifacts.hub.pictures import draw_expert_map, expert_grids, rank_pictures
from adalora_dist.artifacts.peft_format import save_adalora, save_lora, vllm_options
from adalora_dist.artifacts.tables import rank_table
from adalora_dist.backbones.names import plain_model
from adalora_dist.io.foreign_files import read_object
from tests.support.expert_models import MIXTURES, loss_of, mixture
from tests.support.expert_steps import expert_layers
from tests.support.refusals import refusal
from tests.support.steps import make_steps
from tests.support.tiny_any import tiny_model

ALWAYS = ("mixtral", "gpt_oss", "llama4", "deepseek_v3")
"""One of each layout; the others have Mixtral's, and run with the slow tests."""
IDS = torch.arange(3, 23)[None]
SETTINGS = AdaLoraConfig(
    init_rank=3, target_rank=1.5, initial_warmup_steps=1, final_steps=2, mask_interval_steps=1, alpha=6
)


def trained(kind: str, folder: Path) -> tuple[torch.Tensor, Any, Any]:
    """(logits, updates, model) after a run with ragged ranks; its base is in ``folder``."""
    model = mixture(kind).eval()
    model.save_pretrained(folder)
    adapt(model, SETTINGS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    hooks = attach(model, optimizer, SETTINGS, 6)
    for step in range(6):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.replace(model, optimizer)
    hooks.finish()
    return logits_of(model), hooks.updates(), model


def loaded(folder: Path) -> Any:
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", [k if k in ALWAYS else pytest.param(k, marks=pytest.mark.slow) for k in MIXTURES])
def test_every_form_computes_what_was_trained(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    logits, updates, model = trained(kind, tmp_path / "base")
    assert (logits_of(loaded(tmp_path / "base")) - logits).abs().max() > 0.1

    merge(updates, tmp_path / "base", tmp_path / "merged", task=task_settings(model), show_progress=False)
    torch.testing.assert_close(logits_of(loaded(tmp_path / "merged")), logits, atol=5e-5, rtol=0)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert before.keys() == after.keys() and all(before[key].shape == after[key].shape for key in before)

    save_adapter(updates, tmp_path / "adapter", str(tmp_path / "base"), None)
    plain = loaded(tmp_path / "base")
    load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(plain), logits, atol=1e-6, rtol=0)
    assert {u.name: u.rank for u in read_adapter(tmp_path / "adapter").adapters} == {u.name: u.rank for u in updates}

    save_lora(updates, tmp_path / "lora", str(tmp_path / "base"), model=plain_model(tmp_path / "base", {}))
    of_peft = PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "lora").eval()
    torch.testing.assert_close(logits_of(of_peft), logits, atol=5e-5, rtol=0)
    assert "target_parameters" in vllm_options(tmp_path / "lora")
    save_lora(updates, tmp_path / "padded", None, model=plain_model(tmp_path / "base", {}), pad=True)
    assert read_object(tmp_path / "padded" / "adapter_config.json")["rank_pattern"] == {}


@pytest.mark.parametrize("is_turned", [False, True])
def test_stacks_are_merged_as_they_lie_in_the_files(is_turned: bool, tmp_path: Path) -> None:
    """Qwen3-VL's files may have the matrices of a stack either way round: transformers goes by the shapes."""
    tiny_model(tf.Qwen3VLMoeForConditionalGeneration).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    if is_turned:
        turned = {k: x.mT.contiguous() if ".experts." in k else x for k, x in load_file(file).items()}
        save_file(turned, file, metadata={"format": "pt"})
    model = tf.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "base")
    [layer, *_] = expert_layers(adapt(model, SETTINGS))
    sizes = (layer.d_in, layer.d_out) if is_turned else (layer.d_out, layer.d_in)
    assert load_file(file)[layer.name].shape[1:] == sizes
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    hooks = attach(model, optimizer, SETTINGS, 6)
    make_steps(model, optimizer, hooks, partial(loss_of, model), range(6))
    merge(hooks.updates(), tmp_path / "base", tmp_path / "merged", task=task_settings(model), show_progress=False)
    merged = tf.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(merged), logits_of(model.eval()), atol=5e-5, rtol=0)


def test_an_adapted_model_saves_itself_for_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    logits, _, model = trained("qwen3_moe", tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    of_peft = PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "saved").eval()
    torch.testing.assert_close(logits_of(of_peft), logits, atol=5e-5, rtol=0)


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    _, updates, _ = trained("gpt_oss", tmp_path / "base")
    line = refusal(save_adalora, updates, tmp_path / "x", str(tmp_path / "base"))
    assert "transposed" in line and "gate_up_proj" in line
    model = plain_model(tmp_path / "base", {})
    base = str(tmp_path / "base")
    line = refusal(partial(save_adalora, model=model), updates, tmp_path / "x", base)
    assert "no AdaLoRA of experts" in line and "down_proj" in line


def test_pictures_have_a_map_of_layers_by_experts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pattern = {f"model.layers.{k}.mlp.experts.{e}.{p}": e % 5 for k in range(40) for e in reversed(range(128))
               for p in ("gate_up_proj", "down_proj")}  # fmt: skip
    assert expert_grids(pattern)["down_proj"]["model.layers.7.mlp.experts"] == [e % 5 for e in range(128)]
    assert [path.name for path in rank_pictures(pattern, tmp_path, "svg")] == ["ranks.svg", "experts.svg"]
    written = (tmp_path / "experts.svg").read_text(encoding="utf-8")
    assert "model.layers.38.mlp.experts" in written and "model.layers.39.mlp.experts" not in written  # every second
    assert f"down_proj: {40 * sum(e % 5 for e in range(128))} triplets, {40 * 26} experts at 0" in written
    few = {name: rank for name, rank in pattern.items() if int(name.split(".")[5]) < 3}
    assert rank_pictures({"q_proj": 1}, tmp_path, "png") == [tmp_path / "ranks.png"]
    draw_expert_map(few | {"layers.0.experts.0.w1": 9}, tmp_path / "few.svg")
    assert "9" in re.findall(r">(\d+)</text>", (tmp_path / "few.svg").read_text(encoding="utf-8"))


def test_tables_have_experts_by_layer_and_by_expert() -> None:
    pattern = {f"model.layers.{k}.mlp.experts.{e}.down_proj": k + e for k in range(2) for e in range(3)}
    shown = rank_table(pattern | {"model.layers.0.self_attn.q_proj": 2})
    assert "model.layers.1.mlp.experts.down_proj: 1 2 3" in shown
    row = next(line.split() for line in shown.splitlines() if line.startswith("model.layers.0 "))
    assert sorted(row[1:]) == ["2", "3", "5"]
    many = rank_table({f"layers.0.experts.{e}.up_proj": e % 2 for e in range(40)})
    assert "layers.0.experts.up_proj: 40 experts, 20 at 0, mean 0.5, largest 1" in many
