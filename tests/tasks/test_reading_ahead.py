"""A language model that sees what it is to predict is refused, whatever its class is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.padding import is_purely_causal
from adalora_dist.tasks.reading_ahead import refuse_reading_ahead
from tests.support.models import config
from tests.support.refusals import refusal
from tests.support.tiny_any import tiny_model

BOTH_WAYS: dict[str, dict[str, Any]] = {
    "BertLMHeadModel": {}, "RobertaForCausalLM": {}, "ElectraForCausalLM": {}, "XLNetLMHeadModel": {"d_head": 8},
    "XLMWithLMHeadModel": {}, "RoFormerForCausalLM": {},
}  # fmt: skip
ONE_WAY: dict[str, dict[str, Any]] = {
    "BertLMHeadModel": {"is_decoder": True}, "RobertaForCausalLM": {"is_decoder": True},
    "XLMWithLMHeadModel": {"causal": True}, "LlamaForCausalLM": {}, "GPT2LMHeadModel": {}, "MambaForCausalLM": {},
    "BloomForCausalLM": {}, "GPTJForCausalLM": {}, "BartForCausalLM": {}, "MixtralForCausalLM": {},
    "T5ForConditionalGeneration": {},
}  # fmt: skip


def made(class_name: str, changes: dict[str, Any]) -> Any:
    kind = getattr(transformers, class_name)
    assert issubclass(kind.config_class, PretrainedConfig)
    return tiny_model(kind, **changes)


@pytest.mark.parametrize("class_name", BOTH_WAYS)
def test_encoders_with_such_a_head_are_refused(class_name: str) -> None:
    model = made(class_name, BOTH_WAYS[class_name])
    line = refusal(refuse_reading_ahead, model, True)
    assert line.startswith(f"{class_name} reads a text both ways")
    assert ("set is_decoder to true" in line) == (class_name not in ("XLNetLMHeadModel", "XLMWithLMHeadModel"))


@pytest.mark.parametrize("class_name", ONE_WAY)
def test_models_that_write_are_not(class_name: str) -> None:
    model = made(class_name, ONE_WAY[class_name])
    refuse_reading_ahead(model, True)
    if not is_purely_causal(model) and not model.config.is_encoder_decoder:
        refuse_reading_ahead(model.bfloat16(), False)


def test_what_an_adapter_adds_is_not_told_apart() -> None:
    model = made("GPTJForCausalLM", {})
    adapters = adapt(model, config(targets=("q_proj",)))
    with torch.no_grad():
        for parameter in adapters[0].trained().values():
            parameter.add_(0.1)
    model.train()
    refuse_reading_ahead(model, True)
    assert model.training
