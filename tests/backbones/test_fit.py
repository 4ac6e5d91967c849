"""Model, tokenizer and lengths that do not belong together are refused in one line; the rest of them works."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from adalora_dist.artifacts.export import task_settings, with_task
from adalora_dist.backbones.fit import (
    Length,
    Reply,
    check_lengths,
    check_room,
    fit_tokenizer,
    lengths_of,
    padding_token,
    position_limits,
)
from adalora_dist.config.methods import method_config
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.parameter_budget import positions_taken
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.tasks.e2e.config import E2EConfig
from adalora_dist.tasks.glue.config import GlueConfig
from adalora_dist.tasks.squad.config import SquadConfig
from adalora_dist.tasks.summarization.config import SummarizationConfig
from tests.support.refusals import refusal

VOCABULARY, POSITIONS = 32, 12
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
SIDES = dict(
    vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    decoder_start_token_id=2,
)  # fmt: skip
GPT = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS)
LLAMA = dict(SIZES, num_key_value_heads=1, max_position_embeddings=POSITIONS)
ENDS = {  # with the number of rows in the table or what the configuration calls it, and what tokens that is
    "GPT2LMHeadModel": (GPT, POSITIONS),
    "OpenAIGPTLMHeadModel": (GPT, POSITIONS),
    "GPTBigCodeForCausalLM": (GPT, POSITIONS),
    "GPTJForCausalLM": (GPT | dict(rotary_dim=4), POSITIONS),
    "CTRLLMHeadModel": (GPT | dict(dff=24), POSITIONS),
    "GPTNeoForCausalLM": (
        dict(vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
             max_position_embeddings=POSITIONS), POSITIONS,
    ),
    "OPTForCausalLM": (
        dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24,
             word_embed_proj_dim=16, max_position_embeddings=POSITIONS), POSITIONS,
    ),
    "BertForSequenceClassification": (SIZES | dict(max_position_embeddings=POSITIONS), POSITIONS),
    "ElectraForSequenceClassification": (SIZES | dict(max_position_embeddings=POSITIONS), POSITIONS),
    "RobertaForSequenceClassification": (SIZES | dict(max_position_embeddings=POSITIONS + 2), POSITIONS),
    "XLMRobertaForSequenceClassification": (SIZES | dict(max_position_embeddings=POSITIONS + 2), POSITIONS),
    "MPNetForSequenceClassification": (SIZES | dict(max_position_embeddings=POSITIONS + 2), POSITIONS),
    "DistilBertForSequenceClassification": (
        dict(vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=POSITIONS),
        POSITIONS,
    ),
}  # fmt: skip
TWO_SIDED_ENDS = ("BartForConditionalGeneration", "MBartForConditionalGeneration", "PegasusForConditionalGeneration",
                  "MarianMTModel", "BlenderbotForConditionalGeneration")  # fmt: skip
ENDLESS = {
    "T5ForConditionalGeneration": dict(
        vocab_size=VOCABULARY, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    ),
    "M2M100ForConditionalGeneration": SIDES | dict(max_position_embeddings=POSITIONS),
    "BloomForCausalLM": dict(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2),
    "DebertaV2ForSequenceClassification": SIZES
    | dict(relative_attention=True, position_biased_input=False, pos_att_type="p2c|c2p",
           max_position_embeddings=POSITIONS),
}  # fmt: skip


def made(class_name: str, sizes: dict) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**sizes)).eval()


def tokens(length: int) -> torch.Tensor:
    return torch.arange(length)[None] % (VOCABULARY - 4) + 4


def words(count: int, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of ``count`` words, [0], [1], ..."""
    backend = Tokenizer(models.WordLevel({f"[{k}]": k for k in range(count)}, unk_token="[3]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[3]", **special)


# ----------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("class_name", ENDS)
def test_the_limit_is_exact(class_name):
    sizes, expected = ENDS[class_name]
    model = made(class_name, sizes)
    limits = position_limits(model)
    assert limits[""].length == expected and limits[""].where
    model(input_ids=tokens(expected))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=tokens(expected + 1))
    check_lengths(model, [Length("max_length", expected, "")])
    message = refusal(check_lengths, model, [Length("max_length", expected + 1, "")])
    assert f"max_length={expected + 1}" in message and f"--max-length {expected}, or less" in message


@pytest.mark.parametrize("class_name", TWO_SIDED_ENDS)
def test_the_limits_of_two_sides_are_exact(class_name):
    model = made(class_name, SIDES | dict(max_position_embeddings=POSITIONS))
    limits = position_limits(model)
    assert {side: limit.length for side, limit in limits.items()} == {"source": POSITIONS, "target": POSITIONS}
    model(input_ids=tokens(POSITIONS), decoder_input_ids=tokens(POSITIONS))
    for source, target in ((POSITIONS + 1, 4), (4, POSITIONS + 1)):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tokens(source), decoder_input_ids=tokens(target))
    message = refusal(check_lengths, model, [Length("max_source_length", 99, "source")])
    assert f"set --max-source-length {POSITIONS}, or less" in message and "encoder" in message
    message = refusal(check_lengths, model, [Length("max_target_length", 99, "target")])
    assert f"set --max-target-length {POSITIONS}, or less" in message and "decoder" in message


@pytest.mark.parametrize("class_name", ENDLESS)
def test_what_has_no_end_is_let_through(class_name, caplog):
    model = made(class_name, ENDLESS[class_name])
    assert position_limits(model) == {}
    long = tokens(5 * POSITIONS)
    model(input_ids=long, **({"decoder_input_ids": long} if model.config.is_encoder_decoder else {}))
    check_lengths(model, [Length("max_length", 10**6, ""), Length("max_source_length", 10**6, "source")])
    assert not caplog.records


def test_rotary_models_may_go_further_with_a_warning(caplog):
    model = made("LlamaForCausalLM", LLAMA)
    with caplog.at_level(logging.WARNING):
        check_lengths(model, [Length("max_length", POSITIONS, "")])
        assert not caplog.records
        check_lengths(model, [Length("max_length", POSITIONS + 1, "")])
    assert f"was made for {POSITIONS} positions" in caplog.text
    model(input_ids=tokens(POSITIONS + 1))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CommonsenseConfig(), {("max_length", "")}),  # which has room for the longest reply
        (E2EConfig(), {("max_length", ""), ("max_new_tokens", "")}),
        (GlueConfig(), {("max_length", "")}),
        (SquadConfig(), {("max_length", "")}),
        (SummarizationConfig(),
         {("max_source_length", "source"), ("max_target_length", "target"), ("max_new_tokens", "target")}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_each_recipe_puts_through(config, expected):
    assert {(name, side) for name, _, side in lengths_of(config)} == expected
    assert all(tokens > 0 for _, tokens, _ in lengths_of(config))


def test_a_given_reply_length_counts():
    config = CommonsenseConfig(evaluation={"max_new_tokens": 9})
    assert Length("max_new_tokens", 9, "") in lengths_of(config)


@pytest.mark.parametrize(
    ("prompt", "reply", "remedy"),
    [
        (8, Reply("max_new_tokens", 5), "--max-new-tokens 4,"),
        (12, Reply("max_new_tokens", 1), "shorten it"),
        (4, Reply("answer_tokens", 5, 2), "answer_tokens=5 in each of 2 turns behind"),
        (4, Reply("answer_tokens", 5, 2), "--answer-tokens 4,"),
    ],
)
def test_a_reply_has_room_behind_the_longest_prompt(prompt, reply, remedy):
    model = made("GPT2LMHeadModel", GPT)
    check_room(model, POSITIONS - 4, Reply("max_new_tokens", 4))
    check_room(model, POSITIONS - 4, Reply("answer_tokens", 2, 2))
    assert remedy in refusal(check_room, model, prompt, reply)
    check_room(made("LlamaForCausalLM", LLAMA), POSITIONS, Reply("max_new_tokens", 4))  # rotary


def test_a_prefix_leaves_the_text_fewer_positions(caplog):
    model, taken = made("GPT2LMHeadModel", GPT), 3
    most = [Length("max_length", POSITIONS - taken, "")]
    config = method_config("prefix", prefix_length=taken)
    assert positions_taken(model, config) == taken
    assert positions_taken(model, method_config("prefix", budget="96")) == 96 // 32
    assert positions_taken(model, method_config("lora")) == 0
    adapt(model, config)
    model(input_ids=tokens(POSITIONS - taken))
    with pytest.raises(IndexError):
        model(input_ids=tokens(POSITIONS - taken + 1))
    check_lengths(model, most, taken)
    message = refusal(check_lengths, model, most, taken + 1)
    assert "4 of them the prefix's" in message and f"--max-length {POSITIONS - taken - 1}, or less" in message
    assert f"--prefix-length {POSITIONS - 1}, or less" in refusal(check_lengths, model, most, POSITIONS)
    reply = Reply("max_new_tokens", 2)
    check_room(model, POSITIONS - taken - 2, reply, taken)
    assert "--max-new-tokens 1, or less" in refusal(check_room, model, POSITIONS - taken - 1, reply, taken)
    check_lengths(made("LlamaForCausalLM", LLAMA), most, taken + 1)
    assert f"was made for {POSITIONS} positions (max_position_embeddings), 4 of them the prefix's" in caplog.text


# ----------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    ("special", "expected"),
    [({"pad_token": "[5]", "eos_token": "[2]"}, 5), ({"eos_token": "[2]"}, 2), ({}, 0)],
)
def test_the_models_padding_becomes_the_tokenizers(special, expected):
    tokenizer = words(VOCABULARY, **special)
    assert padding_token(tokenizer) == expected
    for own in (None, 7):
        model = made("LlamaForCausalLM", LLAMA | dict(pad_token_id=own))
        fit_tokenizer(model, tokenizer)
        assert model.config.pad_token_id == expected


def test_also_that_of_the_text_in_a_model_of_several_parts():
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(model_type="clip_vision_model", image_size=8, patch_size=4, **small)
    text = dict(model_type="llama", **LLAMA)
    model = made("LlavaForConditionalGeneration", dict(text_config=text, vision_config=vision))
    fit_tokenizer(model, words(VOCABULARY, pad_token="[5]"))
    assert model.config.pad_token_id == model.config.text_config.pad_token_id == 5
    merged = with_task(json.loads(json.dumps({"text_config": {"pad_token_id": 1, "a": 2}})), {"pad_token_id": 5})
    assert merged == {"pad_token_id": 5, "text_config": {"pad_token_id": 5, "a": 2}}


@pytest.mark.parametrize("own", [None, 0])
def test_a_decoder_as_classifier_says_the_same_in_every_batch(own, tmp_path):
    """What was silently wrong: logits depended on what a row was batched with, or there was a traceback."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA, pad_token_id=own, num_labels=3)).eval()
    tokenizer = words(VOCABULARY, eos_token="[2]")  # as LLaMA's: no padding token, so EOS
    fit_tokenizer(model, tokenizer)
    padding = padding_token(tokenizer)
    rows = [[5, 6, 7, 8, 9], [10, 11], [0, 12, 13]]
    ids = torch.tensor([row + [padding] * (5 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (5 - len(row)) for row in rows])
    together = model(input_ids=ids, attention_mask=mask).logits
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    torch.testing.assert_close(together, alone)
    assert task_settings(model)["pad_token_id"] == padding  # and so the merged model's
    model.save_pretrained(tmp_path)
    again = LlamaForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=ids, attention_mask=mask).logits, alone)


@pytest.mark.parametrize("special", [{}, {"pad_token": "<pad>"}, {"eos_token": "<end>"}])
def test_tokens_beyond_the_embeddings_are_refused(special):
    count = VOCABULARY if special else VOCABULARY + 2
    model = made("LlamaForCausalLM", LLAMA)
    fit_tokenizer(model, words(VOCABULARY))
    message = refusal(fit_tokenizer, model, words(count, **special))
    assert f"tokens beyond the model's {VOCABULARY} embeddings" in message and f"= {VOCABULARY}" in message
    fit_tokenizer(model, words(VOCABULARY - 5))  # fewer tokens than rows: many models have spare ones


def test_partitioned_embeddings_are_asked_for_their_whole_size():
    model = made("LlamaForCausalLM", LLAMA)
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_shape = torch.Size((VOCABULARY, 16))
    model.get_input_embeddings = lambda: SimpleNamespace(weight=weight)
    fit_tokenizer(model, words(VOCABULARY))
    assert "beyond" in refusal(fit_tokenizer, model, words(VOCABULARY + 1))


def test_positions_that_begin_behind_the_padding_need_the_same_padding():
    model = made("RobertaForSequenceClassification", SIZES | dict(max_position_embeddings=14, pad_token_id=1))
    fit_tokenizer(model, words(VOCABULARY, pad_token="[1]"))
    message = refusal(fit_tokenizer, model, words(VOCABULARY, pad_token="[0]"))
    assert (
        "pads with id 0" in message and "its own, 1" in message and "set the tokenizer's pad_token to '[1]'" in message
    )
    bert = made("BertForSequenceClassification", SIZES | dict(pad_token_id=1))
    fit_tokenizer(bert, words(VOCABULARY, pad_token="[0]"))  # its positions are counted from the left
