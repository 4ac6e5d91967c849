"""An adapter answers its base's attributes, and nothing of the base appears twice."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    LongT5Config,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from adalora_dist.methods.adalora.layers import Lambdas, SVDLinear
from adalora_dist.methods.inject import adapt
from tests.support.models import config

SIZES = dict(vocab_size=40, d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4, decoder_start_token_id=0)
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
T5_CLASS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**SIZES)),
    "flan": lambda: T5ForConditionalGeneration(T5Config(**SIZES, **GATED)),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**SIZES, **GATED)),
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(**SIZES)),
    "longt5": lambda: LongT5ForConditionalGeneration(LongT5Config(**SIZES, local_radius=3)),
    "longt5_global": lambda: LongT5ForConditionalGeneration(
        LongT5Config(**SIZES, local_radius=3, encoder_attention_type="transient-global", global_block_size=4)
    ),
    "switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**SIZES, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2)
    ),
}


def adapted(base: nn.Module, rank: int = 2) -> SVDLinear:
    layer = SVDLinear(base, 5, 8, rank, 1.0)
    if rank:
        layer.reset(torch.Generator().manual_seed(0))
    Lambdas([layer])
    return layer


@pytest.mark.parametrize("rank", [0, 2])
def test_data_of_the_base_are_answered(rank):
    linear, conv = nn.Linear(5, 8), Conv1D(8, 5)
    linear.scales = torch.ones(3)  # as a quantised linear has
    layer = adapted(linear, rank)
    assert layer.weight is linear.weight and layer.bias is linear.bias and layer.scales is linear.scales
    assert (layer.in_features, layer.out_features, layer.weight.dtype) == (5, 8, torch.float32)
    assert not hasattr(layer, "nf") and adapted(nn.Linear(5, 8, bias=False), rank).bias is None
    layer = adapted(conv, rank)
    assert (layer.nf, layer.nx) == (8, 5) and layer.weight is conv.weight and not hasattr(layer, "in_features")


def test_methods_and_marks_of_the_base_are_not():
    linear = nn.Linear(5, 8)
    linear._mark, linear.ds_mark, linear.weights_on_disk = 1, 2, {}
    layer = adapted(linear)
    assert not any(hasattr(layer, name) for name in ("_mark", "ds_mark", "weights_on_disk", "reset_parameters", "none"))
    with pytest.raises(AttributeError, match="'SVDLinear' object has no attribute 'none'"):
        _ = layer.none
    assert not hasattr(adapted(nn.Linear(5, 8), rank=0), "P")


def test_nothing_of_the_base_appears_twice():
    layer = adapted(nn.Linear(5, 8))
    names = {"P", "Qt", "base.weight", "base.bias"}
    assert {n for n, _ in layer.named_parameters(remove_duplicate=False)} == names == set(layer.state_dict())
    with pytest.raises(AttributeError):  # what a half-built layer has no base for
        _ = SVDLinear.__new__(SVDLinear).weight


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_answers_for_its_own_base(again):
    layer = adapted(nn.Linear(5, 8))
    other = again(layer)
    assert other.weight is other.base.weight is not layer.weight and torch.equal(other.weight, layer.weight)
    with torch.no_grad():
        other.base.weight.add_(1)
    assert not torch.equal(other.weight, layer.weight)


def test_the_base_may_be_swapped_in_place():
    """Engines replace parameters on the base: FSDP2 by DTensors, ZeRO-3 by partitions, a cast by other values."""
    layer = adapted(nn.Linear(5, 8))
    layer.base.weight = nn.Parameter(torch.zeros(8, 5, dtype=torch.bfloat16))
    assert layer.weight.dtype == torch.bfloat16 and not layer.weight.any()


@pytest.mark.parametrize("kind", T5_CLASS)
def test_models_that_ask_for_a_weights_type_train(kind):
    torch.manual_seed(0)
    model = T5_CLASS[kind]().eval()
    batch = {"input_ids": torch.arange(1, 13)[None], "labels": torch.arange(3, 9)[None]}
    with torch.no_grad():
        plain = model(**batch).logits
    matrices = adapt(model, config(targets=("all-linear",)))
    assert torch.equal(model(**batch).logits, plain)
    nn.init.ones_(model.adalora.lam)
    model(**batch).loss.backward()
    idle = [m.name for m in matrices if m.P.grad is None or not m.P.grad.any()]
    assert all(".experts." in name for name in idle)  # no token may have been sent to one
    assert any(name.endswith(".wo") for name in (m.name for m in matrices if m.name not in idle))
