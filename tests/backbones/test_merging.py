"""Adapters merged while texts are generated: the same texts, a plain model's operations, the same weights after."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_dist.backbones.merging import check_mergeable, mergeable_in, merged
from adalora_dist.config.generation import GenerationConfig
from adalora_dist.config.methods import METHODS
from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.evaluation.texts import generate_texts
from tests.support.adapted_models import IDS, build
from tests.support.ranks import run_ranks
from tests.support.refusals import refused
from tests.support.settings import adapter_section
from tests.support.tiny_language_model import word_tokenizer


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def adapted(kind: str, method: str = "adalora", **changes: Any) -> Any:
    """Every trained number is drawn, so that adapters say something."""
    model = build(kind, **changes)
    adapt(model, adapter_section(method, init_rank=3, targets=("all-linear",), drop_layers=1), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("method", ["adalora", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "deberta"])
def test_a_merged_model_computes_the_same_and_comes_back_bit_for_bit(kind: str, method: str) -> None:
    model, plain = adapted(kind, method), build(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, counted = logits(model), [Operations(), Operations()]
    assert (expected - logits(plain)).abs().max() > 0.1
    with merged(model):
        assert (logits(model) - expected).abs().max() < 1e-5 * expected.abs().max()
        for inside, one in zip(counted, (model, plain), strict=True):
            with inside:
                logits(one)
    assert counted[0].counts == counted[1].counts
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", [name for name, settings in METHODS.items() if settings.has_adapters])
def test_whatever_is_merged_is_what_the_method_computes(method: str) -> None:
    """Of a method whose settings say that it is not, nothing is."""
    model = adapted("llama", method)
    expected = logits(model)
    assert bool(mergeable_in(model)) == METHODS[method].merges
    with merged(model):
        assert (logits(model) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_weights_come_back_after_an_error() -> None:
    model = adapted("llama")
    expected = logits(model)
    with pytest.raises(RuntimeError, match="out of memory"), merged(model):
        raise RuntimeError("out of memory")
    assert torch.equal(logits(model), expected) and not any("forward" in vars(m) for m in model.modules())


def test_texts_are_the_same() -> None:
    model, sources = adapted("llama"), [[1, *range(5, 5 + length)] for length in (3, 9, 5, 1)]
    tokenizer = word_tokenizer([chr(97 + k // 26) + chr(97 + k % 26) for k in range(44)])

    def texts(**how: Any) -> list[str]:
        settings = GenerationConfig(num_beams=2, max_new_tokens=8, eval_batch_size=2, **how)
        return generate_texts(model, tokenizer, sources, [len(s) for s in sources], settings)

    found = texts(merge_to_generate=True)
    assert found == texts() and len(set(found)) > 1


def test_a_weight_that_others_share_stays_and_so_do_packed_ones() -> None:
    """The embeddings must not change with the head's update."""
    tied = adapted("llama", tie_word_embeddings=True)
    adapt_head = next(module for module in tied.modules() if hasattr(module, "lambdas"))
    adapt_head.base.weight = tied.get_input_embeddings().weight  # as a head that is adapted and tied
    assert adapt_head not in mergeable_in(tied) and len(mergeable_in(tied)) == 13


def refusals(rank: int, world_size: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for method in ("dora", "vera", "lora_fa", "adadora"):
        with refused("merge_to_generate true: there is nothing to merge"):
            check_mergeable(adapted("llama", method))
    model = adapted("llama")
    check_mergeable(torch.nn.parallel.DistributedDataParallel(model))
    fully_shard(model)
    with refused("whole in every process"):
        check_mergeable(model)


def test_what_cannot_be_merged_is_refused() -> None:
    run_ranks(1, refusals)
