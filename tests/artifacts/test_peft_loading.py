"""What PEFT makes of adapters as they are exported: models with experts, heads of tasks, its own automatic classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from adalora_dist.artifacts import peft_check
from adalora_dist.artifacts.peft_check import not_verified, taken_for_experts, verify
from adalora_dist.artifacts.peft_format import save_adalora, save_lora
from adalora_dist.backbones.bypass import weights_read_directly
from adalora_dist.backbones.linears import linear_shape
from adalora_dist.backbones.names import FileNames, plain_model
from adalora_dist.methods.adalora.start import read_peft
from adalora_dist.methods.sites import find_targets
from tests.support.adapted_models import TOLERANCE, weights_of, with_adapters
from tests.support.plain_models import ANSWERS, CAUSAL, CLASSIFIER, EXPERTS, PLAIN, SEQ2SEQ
from tests.support.refusals import refusal

IDS = torch.tensor([[1, 5, 9, 4, 30, 2]])
FORMS: dict[str, Callable[..., None]] = {
    "lora": save_lora,
    "padded": lambda *args, **options: save_lora(*args, **options, pad=True),
    "peft": save_adalora,
}


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@torch.no_grad()
def outputs(model: Any, **more: torch.Tensor) -> torch.Tensor:
    """Logits, or both of question answering, behind each other."""
    said = model.eval()(input_ids=IDS, **more)
    return said.logits if "logits" in said else torch.cat([said.start_logits, said.end_logits])


def trained_head(model: Any, *names: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {
            n: p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3))).clone()
            for n, p in model.named_parameters()
            if n.startswith(names)
        }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_models_with_experts(kind: str, form: str, tmp_path: Path) -> None:
    """Dense first layers and shared experts have the names that PEFT looks for in experts."""
    torch.manual_seed(0)
    model = EXPERTS[kind]().eval()
    model.save_pretrained(tmp_path / "base")
    plain = plain_model(tmp_path / "base", {})
    with_adapters(model, tuple(find_targets(model, ("all-linear",))))  # linear maps, not the stacks
    before, expected, adapters = outputs(CAUSAL.from_pretrained(tmp_path / "base")), outputs(model), weights_of(model)
    assert (before - expected).abs().max() > 100 * TOLERANCE
    FORMS[form](adapters, tmp_path / "out", str(tmp_path / "base"), model=plain)
    loaded = PeftModel.from_pretrained(CAUSAL.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert (outputs(loaded) - expected).abs().max() <= TOLERANCE
    config = written(tmp_path / "out")
    if form != "peft":
        dense = {"glm4_moe": 4, "deepseek_v3": 5}.get(kind, 0)
        assert len(config.get("target_parameters", ())) == dense
        started = read_peft(tmp_path / "out", 1.0)  # names and ranks as everywhere
        assert started.keys() == {a.name for a in adapters if a.rank}
    if form == "padded":
        assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] == config["lora_alpha"] == 4
        shapes = {t.shape[0 if "lora_A" in n else 1] for n, t in tensors(tmp_path / "out").items()}
        assert shapes == {4}


def test_padded_adapters_combine_and_swap(tmp_path: Path) -> None:
    """What PEFT refuses where matrices have ranks of their own."""
    torch.manual_seed(0)
    PLAIN["llama"][0]().save_pretrained(tmp_path / "base")
    plain, expected = plain_model(tmp_path / "base", {}), {}
    for name, ranks in (("a", (4, 2, 1, 3)), ("b", (1, 3, 4, 2))):
        model = CAUSAL.from_pretrained(tmp_path / "base")
        with_adapters(model, ranks=ranks)
        expected[name] = outputs(model)
        for form in ("lora", "padded"):
            FORMS[form](weights_of(model), tmp_path / form / name, str(tmp_path / "base"), model=plain)

    def both(form: str) -> Any:
        (tmp_path / form).mkdir(exist_ok=True)
        loaded = PeftModel.from_pretrained(CAUSAL.from_pretrained(tmp_path / "base"), tmp_path / form / "a", "a")
        loaded.load_adapter(tmp_path / form / "b", "b")
        return loaded

    for kind in ("linear", "ties"):
        with pytest.raises(RuntimeError, match="equal size"):
            both("lora").add_weighted_adapter(["a", "b"], [1.0, 0.0], "of both", kind, density=1.0)
        loaded = both("padded")
        loaded.add_weighted_adapter(["a", "b"], [1.0, 0.0], "of both", kind, density=1.0)
        loaded.set_adapter("of both")
        if kind == "linear":
            assert (outputs(loaded) - expected["a"]).abs().max() <= TOLERANCE
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(both("lora"), str(tmp_path / "lora" / "b"), "a")
    swapped = both("padded")
    hotswap_adapter(swapped, str(tmp_path / "padded" / "b"), "a")
    assert (outputs(swapped) - expected["b"]).abs().max() <= TOLERANCE


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_without_peft_every_such_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    EXPERTS["glm4_moe"]().save_pretrained(tmp_path)
    plain = plain_model(tmp_path, {})
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.shared_experts.w"]
    assert taken_for_experts(names, plain) == names[:1]
    monkeypatch.setattr(peft_check, "find_spec", lambda name: None)
    assert taken_for_experts(names, plain) == names[:1]
    assert "PEFT is not installed" in not_verified(plain)
    assert "config.json" in not_verified(None)


AUTOMATIC: dict[str, tuple[str, Any, str, tuple[str, ...]]] = {
    "CAUSAL_LM": ("llama", CAUSAL, "CausalLM", ()),
    "CAUSAL_LM, transposed": ("gpt2 without prefix", CAUSAL, "CausalLM", ()),
    "SEQ_2_SEQ_LM": ("bart", SEQ2SEQ, "Seq2SeqLM", ()),
    "SEQ_2_SEQ_LM, T5": ("t5", SEQ2SEQ, "Seq2SeqLM", ()),
    "SEQ_CLS": ("bert without pooler", CLASSIFIER, "SequenceClassification", ("bert.pooler", "classifier")),
    "SEQ_CLS, head of two layers": ("roberta", CLASSIFIER, "SequenceClassification", ("classifier",)),
    "SEQ_CLS, two heads": ("deberta", CLASSIFIER, "SequenceClassification", ("pooler", "classifier")),
    "SEQ_CLS, decoder": ("llama classifies", CLASSIFIER, "SequenceClassification", ("score",)),
    "QUESTION_ANS": ("bert for answers", ANSWERS, "QuestionAnswering", ("qa_outputs",)),
}
"""Of PEFT's task: what is saved, loaded as, the end of PEFT's class, and what is trained in full."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", AUTOMATIC)
def test_automatic_classes_load_the_export(task: str, form: str, tmp_path: Path) -> None:
    kind, auto_class, automatic, heads = AUTOMATIC[task]
    torch.manual_seed(0)
    PLAIN[kind][0]().save_pretrained(tmp_path / "base")
    model = auto_class.from_pretrained(tmp_path / "base").eval()
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    plain = plain_model(model.config, {"architectures": [type(model).__name__]})
    if "score" in heads:
        model.config.pad_token_id = 0
    trained = trained_head(model, *heads) if heads else {}
    with_adapters(model, targets=(".*(query|value|q|v|query_proj|value_proj|q_proj|v_proj|c_attn)",))
    expected, adapters = outputs(model, **more), weights_of(model)
    FORMS[form](adapters, tmp_path / "out", str(tmp_path / "base"), trained=trained, model=plain)
    config = written(tmp_path / "out")
    assert config["task_type"] == task.partition(",")[0]
    assert config["base_model_name_or_path"] == str(tmp_path / "base") and config["revision"] is None
    assert (config["modules_to_save"] or []) == sorted(heads)
    loaded = getattr(peft, f"AutoPeftModelFor{automatic}").from_pretrained(tmp_path / "out")
    assert (outputs(loaded, **more) - expected).abs().max() <= TOLERANCE


def test_a_task_that_peft_does_not_know(tmp_path: Path) -> None:
    """AutoPeftModel goes by the class's name."""
    torch.manual_seed(0)
    PLAIN["vit"][0]().save_pretrained(tmp_path / "base")
    model = PLAIN["vit"][1].from_pretrained(tmp_path / "base").eval()
    plain = plain_model(model.config, {"architectures": [type(model).__name__]})
    trained = trained_head(model, "classifier")
    with_adapters(model)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixels).logits
        save_lora(weights_of(model), tmp_path / "out", str(tmp_path / "base"), trained=trained, model=plain)
        mapping = {"base_model_class": "ViTForImageClassification", "parent_library": "transformers"}
        assert written(tmp_path / "out")["auto_mapping"] == mapping
        loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "out").eval()
        assert (loaded(pixels).logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", PLAIN)
def test_exports_of_every_kind_are_verified(kind: str, tmp_path: Path) -> None:
    """All forms, all linear maps, new modules trained in full: PEFT has what was written, or this raises."""
    make, auto_class = PLAIN[kind]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    model, report = auto_class.from_pretrained(tmp_path / "base", output_loading_info=True)
    plain = plain_model(model.config, {"architectures": [type(model).__name__]})
    model.file_names = FileNames.without_headers(model, report)
    new = tuple(model.file_names.missing)
    trained = trained_head(model, *new) if new else {}
    linears = [n for n, m in model.named_modules() if linear_shape(m) and n != "lm_head" and f"{n}.weight" not in new]
    past_adapters = weights_read_directly(model, linears)  # refused as targets
    with_adapters(model, targets=tuple(n for n in linears if n not in past_adapters))
    for form, save in FORMS.items():
        save(weights_of(model), tmp_path / form, str(tmp_path / "base"), trained=trained, model=plain)
        assert len(tensors(tmp_path / form)) > len(trained)


def test_an_adapter_that_would_be_another_function_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PLAIN["llama"][0]()
    model.save_pretrained(tmp_path / "base")
    plain = plain_model(tmp_path / "base", {})
    assert plain is not None
    trained = trained_head(model, "lm_head")
    with_adapters(model)
    good = tmp_path / "lora"
    save_lora(weights_of(model), good, str(tmp_path / "base"), trained=trained, model=plain)
    names = ["lm_head.weight"]

    def spoilt(**changes: Any) -> str:
        config, file = written(good), good / "adapter_config.json"
        file.write_text(json.dumps(config | changes))
        line = refusal(verify, good, plain, tensors(good), names)
        file.write_text(json.dumps(config))
        return line

    verify(good, plain, tensors(good), names)
    targets = written(good)["target_modules"]
    assert targets[0] in spoilt(target_modules=targets[1:])  # a matrix dropped
    assert "model.layers.0.self_attn.k_proj" in spoilt(target_modules=[*targets, "layers.0.self_attn.k_proj"])
    assert "is scaled by" in spoilt(alpha_pattern={})
    assert "is scaled by" in spoilt(use_rslora=True)
    assert "it stops with" in spoilt(rank_pattern={})
    assert "lm_head.weight" in spoilt(modules_to_save=None)
    file = good / "adapter_model.safetensors"
    stored = tensors(good)
    save_file({n: t + 1 if n.endswith("lora_B.weight") else t for n, t in stored.items()}, file, {"format": "pt"})
    line = refusal(verify, good, plain, stored, names)
    assert "lora_B of" in line and "merged" in line


def test_a_refused_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = EXPERTS["glm4_moe"]()
    model.save_pretrained(tmp_path / "base")
    plain = plain_model(tmp_path / "base", {})
    with_adapters(model, tuple(find_targets(model, ("all-linear",))))  # linear maps, not the stacks
    monkeypatch.setattr("adalora_dist.artifacts.peft_format.taken_for_experts", lambda names, model: [])
    line = refusal(lambda: save_lora(weights_of(model), tmp_path / "lora", str(tmp_path / "base"), model=plain))
    assert str(tmp_path / "lora") in line and "partial" not in line and "mlp" in line
    assert not (tmp_path / "lora").exists()
