"""BitFit: exactly the biases move."""

from __future__ import annotations

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from adalora_dist.config.methods import BitFitConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.inject import adapt, parameter_groups
from tests.support.tiny_language_model import tiny_llama


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def roberta_base() -> RobertaForSequenceClassification:
    with torch.device("meta"):
        return RobertaForSequenceClassification(RobertaConfig(vocab_size=50265, max_position_embeddings=514))


def test_the_published_count() -> None:
    model = roberta_base()
    adapt(model, BitFitConfig())
    names = trained(model)
    assert names == {n for n, _ in model.named_parameters() if n.startswith("roberta.") and n.endswith("bias")}
    assert sum(model.get_parameter(name).numel() for name in names) == 102_144
    adapt(model, BitFitConfig(train_modules=("task-head",)))
    assert trained(model) == names | {n for n, _ in model.named_parameters() if n.startswith("classifier.")}


def test_a_subset_by_name_and_norms() -> None:
    model = roberta_base()
    adapt(model, BitFitConfig(bias_modules=("query", "intermediate")))
    assert len(trained(model)) == 24 and all("query.bias" in n or "intermediate" in n for n in trained(model))
    adapt(model, BitFitConfig(train_norms=True))
    assert {n for n in trained(model) if n.endswith("weight")} == {
        n for n, _ in model.named_parameters() if n.endswith("LayerNorm.weight")
    }


def test_vectors_are_not_decayed() -> None:
    model = roberta_base()
    config = BitFitConfig(train_modules=("task-head",))
    adapt(model, config)
    matrices, vectors = parameter_groups(model, config, 1e-3)
    assert "weight_decay" not in matrices and vectors["weight_decay"] == 0
    assert all(p.dim() == 2 for p in matrices["params"]) and all(p.dim() == 1 for p in vectors["params"])
    adapt(model, BitFitConfig())
    assert len(parameter_groups(model, BitFitConfig(), 1e-3)) == 1  # an empty group is one that DeepSpeed drops


def test_refusals() -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM has no biases, set train_norms"):
        adapt(tiny_llama(20), BitFitConfig())
    with pytest.raises(UserError, match="has no biases in q_proj, set train_norms"):
        adapt(tiny_llama(20), BitFitConfig(bias_modules=("q_proj",)))
    with pytest.raises(UserError, match="is torch.bfloat16.*set dtype to float32"):
        adapt(roberta_base().bfloat16(), BitFitConfig())
    with pytest.raises(UserError, match="bias_modules: 'querry' matches no module"):
        adapt(roberta_base(), BitFitConfig(bias_modules=("querry",)))
