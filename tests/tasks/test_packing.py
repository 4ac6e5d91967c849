"""Several rows in one sequence: the same losses and gradients as with padding, on every class of models that can."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flash_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adalora_dist.config.sections import PackedTrainConfig
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.tasks.packing import decide, pack, positions_of, refusal, sequences
from adalora_dist.tasks.rows.tokens import IGNORED
from tests.support.packed_models import SMALL, some_rows, tiny
from tests.support.refusals import refused
from tests.support.tiny_language_model import tiny_gpt2, tiny_llama

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "olmo2", "smollm3", "gpt_neox", "opt")


def loss_and_gradients(model: Any, rows: Any, packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = causal_loss(rows, 0, torch.device("cpu"), packed=packed)(model, list(range(len(rows))))
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_no_sequence_is_longer_than_the_longest_row_and_every_row_is_in_one() -> None:
    draw = random.Random(1)
    for _ in range(300):
        lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 20))]
        packs = sequences(lengths)
        assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
        assert max(sum(lengths[row] for row in pack) for pack in packs) <= max(lengths) and len(packs) <= len(lengths)
        assert sequences(list(lengths)) == packs and sequences(lengths, flat=True) == [list(range(len(lengths)))]


def test_positions_begin_anew_and_no_row_is_asked_for_the_next_ones_first_token() -> None:
    rows: Any = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}, {"input_ids": [9, 3], "labels": [9, 3]}]
    rows.append({"input_ids": [4], "labels": [4]})
    batch = pack(rows, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 3, 4, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, 8], [IGNORED, 3, IGNORED, IGNORED]]
    assert pack(rows, 0, flat=True)["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_without_packing(family: str, attention: str) -> None:
    model = tiny(family, **({} if family == "gpt2" else {"attn_implementation": attention}))
    if family == "gpt2":
        model.set_attn_implementation(attention)
    assert refusal(model, 0) == ""
    for seed in range(2):
        rows = some_rows(9, seed)
        (one, gradients), (other, packed) = (loss_and_gradients(model, rows, how) for how in (False, True))
        assert other == pytest.approx(one, rel=1e-5) and gradients.keys() == packed.keys()
        scale = max(float(g.abs().max()) for g in gradients.values())
        for name, gradient in gradients.items():
            assert float((packed[name] - gradient).abs().max()) <= 1e-5 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_pack_rightly_or_are_refused_by_name(family: str) -> None:
    model = tiny(family)
    if reason := refusal(model, 0):
        assert type(model).__name__ in reason, reason
        return
    rows = some_rows(9)
    (one, gradients), (other, packed) = (loss_and_gradients(model, rows, how) for how in (False, True))
    assert other == pytest.approx(one, rel=1e-5)
    scale = max(float(g.abs().max()) for g in gradients.values())
    assert all(float((packed[n] - g).abs().max()) <= 1e-5 * scale for n, g in gradients.items())


def test_models_that_cannot_are_refused_by_name() -> None:
    class Leaking(type(tiny_llama(40))):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, position_ids: Any = None, **others: Any) -> Any:
            return super().forward(input_ids=input_ids, **others)

    model = tiny_llama(40)
    plan = BatchPlan([3, 9, 4, 5], [1] * 4, 4, 0)
    said: list[str] = []
    assert decide(model, plan, PackedTrainConfig(packing="on"), 1, 0, said.append)
    assert "padding is 41.7% of all positions without it" in said[0] and "are saved" in said[0]
    model.__class__ = Leaking
    with refused("packing=on: Leaking is not causal throughout|packing=on: Leaking .* lets rows see each other"):
        decide(model, plan, PackedTrainConfig(packing="on"), 1, 0, said.append)
    assert not decide(model, plan, PackedTrainConfig(packing="auto"), 1, 0, said.append) and "Leaking" in said[-1]
    assert not decide(
        tiny_gpt2(), BatchPlan([4] * 8, [1] * 8, 4, 0), PackedTrainConfig(packing="auto"), 1, 0, said.append
    )
    assert "saves too little" in said[-1]
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=60, hidden_size=16, num_hidden_layers=1)
    )
    assert "MambaForCausalLM takes no position_ids" in refusal(mamba, 0)


def test_the_trial_finds_rows_that_see_each_other_and_positions_that_go_on() -> None:
    model = tiny_llama(40)
    plain = model.forward

    def deaf(input_ids: Any = None, position_ids: Any = None, **others: Any) -> Any:
        return plain(input_ids=input_ids, **others)

    model.forward = deaf
    assert "LlamaForCausalLM with attention sdpa lets rows see each other" in refusal(model, 0)

    model = tiny_gpt2()
    table = model.transformer.wpe
    table.forward = lambda places: type(table).forward(table, torch.arange(places.shape[-1])[None])
    assert "GPT2LMHeadModel does not begin the positions of each row anew" in refusal(model, 0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_rounding_by_an_experts_other_tokens_is_no_leak(family: str) -> None:
    experts = {"num_local_experts": 4} if family == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 16}
    for seed in range(3):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **SMALL, pad_token_id=0, num_experts_per_tok=2, **experts)
        assert refusal(AutoModelForCausalLM.from_config(config), 0) == ""


def test_what_is_saved_is_counted_from_the_plan() -> None:
    plan = BatchPlan([10, 5, 5, 2], [1] * 4, 4, 0, group_by_length=False)
    assert positions_of(plan, 4, 1, flat=False) == (22, 40, 30)
    assert positions_of(plan, 4, 1, flat=True) == (22, 40, 22)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_flash_attention_is_given_the_ends_of_all_rows(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel runs on no CPU: a function in its place notes what it is given, and computes what that means."""
    model, rows, seen = tiny(family), some_rows(7), []
    expected, gradients = loss_and_gradients(model, rows, packed=False)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: Any = None, **how: Any) -> Any:
        assert how["causal"] and not how.get("dropout_p")
        q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
        part = torch.nn.functional.scaled_dot_product_attention
        return part(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True).transpose(-2, -3)

    def of_variable_length(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert q.dim() == 3 and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        assert cu_seqlens_q.dtype == torch.int32
        ends = cu_seqlens_q.tolist()
        seen.append((ends, int(max_seqlen_q)))
        how = {"softmax_scale": softmax_scale, "causal": causal, "dropout_p": dropout_p}
        return torch.cat([attend(q[a:b], k[a:b], v[a:b], **how) for a, b in itertools.pairwise(ends)])

    functions = (attend, of_variable_length, None, None, None)
    settings = flash._lazy_define_process_function(of_variable_length)
    monkeypatch.setattr(
        flash_attention, "get_target_dtype", lambda *_: None
    )  # the kernel's place has no need of halves
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: (functions, (settings, dict)))
    model.config._attn_implementation = name
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, flash_attention.flash_attention_forward)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, name, flash_attention_mask)
    loss, packed = loss_and_gradients(model, rows, packed=True)
    lengths = [len(row["input_ids"]) for row in rows]
    assert seen == [([0, *itertools.accumulate(lengths)], max(lengths))] * model.config.num_hidden_layers
    assert loss == pytest.approx(expected, rel=1e-5)
    scale = max(float(g.abs().max()) for g in gradients.values())
    assert all(float((packed[n] - g).abs().max()) <= 1e-5 * scale for n, g in gradients.items())
    assert refusal(model, 0) == ""
