"""Scores by generation follow this run's settings, whatever generation_config.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from adalora_dist.config.generation import GenerationConfig
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.commonsense.generation import evaluate_generation
from adalora_dist.tasks.commonsense.prompts import check_questions, longest_reply, prompt_tokens
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.evaluation.decoding import decoding, first_target_token
from adalora_dist.tasks.evaluation.texts import generate_texts
from tests.support.refusals import refusal
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama, word_tokenizer
from tests.support.tiny_text_project import tiny_bart

VOCABULARY = 40
THEIRS: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1}, {"encoder_no_repeat_ngram_size": 1}, {"bad_words_ids": [[k] for k in range(5, 30)]},
    {"suppress_tokens": list(range(5, 30))}, {"begin_suppress_tokens": list(range(5, 30))}, {"forced_bos_token_id": 7},
    {"forced_eos_token_id": 7}, {"force_words_ids": [[7]]}, {"min_length": 30}, {"min_new_tokens": 30},
    {"max_length": 3}, {"max_new_tokens": 1}, {"max_time": 1e-9}, {"do_sample": True, "temperature": 9.0},
    {"do_sample": True, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.5},
    {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 2, "length_penalty": -9.0},
    {"num_beams": 2, "early_stopping": "never"}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 3.0},
    {"repetition_penalty": 20.0}, {"encoder_repetition_penalty": 20.0}, {"sequence_bias": [[[9], -50.0]]},
    {"exponential_decay_length_penalty": [1, 9.0]}, {"eos_token_id": list(range(2, 30))}, {"eos_token_id": 39},
    {"pad_token_id": 39}, {"bos_token_id": 39}, {"decoder_start_token_id": 9}, {"stop_strings": ["a", "e"]},
    {"cache_implementation": "static"}, {"cache_implementation": "offloaded"}, {"use_cache": False},
    {"guidance_scale": 5.0}, {"renormalize_logits": True, "remove_invalid_values": True}, {"penalty_alpha": 0.6},
    {"dola_layers": "low"}, {"prompt_lookup_num_tokens": 3}, {"return_dict_in_generate": True, "output_scores": True},
    {"output_attentions": True, "output_hidden_states": True}, {"token_healing": True}, {"low_memory": True},
    {"no_such_setting": 3, "max_matching_ngram_size": 2},
]  # fmt: skip


def words() -> list[str]:
    return [chr(97 + k // 26) + chr(97 + k % 26) for k in range(VOCABULARY - 4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(VOCABULARY).save_pretrained(folder / "causal")
    varied_bart().save_pretrained(folder / "encoder-decoder")
    return {name: folder / name for name in ("causal", "encoder-decoder")}


def varied_bart() -> Any:
    """One that writes something else for another source: the plain tiny one sees little of it."""
    config = tiny_bart(VOCABULARY).config
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = type(tiny_bart(VOCABULARY))(config).eval()
    torch.manual_seed(0)
    model.lm_head.weight.data.normal_()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "attn" in name:
            parameter.data.mul_(5) if name.endswith("weight") else parameter.data.normal_()
    return model


def texts_of(model: Any, num_beams: int = 1, batch_size: int = 2) -> list[str]:
    sources = [[1, *range(5, 5 + length)] for length in (3, 9, 5, 1)]
    settings = GenerationConfig(num_beams=num_beams, max_new_tokens=8, eval_batch_size=batch_size)
    return generate_texts(model, word_tokenizer(words()), sources, [len(s) for s in sources], settings)


@pytest.mark.parametrize(("kind", "num_beams"), [("causal", 1), ("encoder-decoder", 3)])
def test_the_models_own_settings_change_nothing(folders: dict[str, Path], kind: str, num_beams: int) -> None:
    auto_class: Any = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    file = folders[kind] / "generation_config.json"
    before = file.read_text()
    model = auto_class.from_pretrained(folders[kind])
    expected = texts_of(model, num_beams)
    assert len(set(expected)) > 1 and max(len(text.split()) for text in expected) > 3
    for theirs in THEIRS:
        file.write_text(json.dumps(json.loads(before) | theirs))
        model.generation_config = transformers.GenerationConfig.from_pretrained(folders[kind])
        own = model.generation_config.to_dict()
        assert texts_of(model, num_beams) == expected, theirs
        assert model.generation_config.to_dict() == own  # given back
    model.config.no_repeat_ngram_size, model.config.num_beams = 1, 5  # where old models have such settings
    assert texts_of(model, num_beams) == expected
    several = json.loads(before) | {"no_repeat_ngram_size": 1, "repetition_penalty": 20.0, "eos_token_id": [2, 9]}
    for content in (json.dumps(several), None):
        file.unlink() if content is None else file.write_text(content)
        assert texts_of(auto_class.from_pretrained(folders[kind]), num_beams) == expected


def test_settings_are_given_back_after_an_error() -> None:
    model = tiny_llama(VOCABULARY)
    own = model.generation_config
    with pytest.raises(RuntimeError), decoding(model, word_tokenizer(words()), GenerationConfig()) as ours:
        assert model.generation_config is ours and ours.max_new_tokens == 64
        raise RuntimeError
    assert model.generation_config is own


def test_greedy_decoding_is_the_argmax_step_by_step() -> None:
    model, tokenizer = tiny_llama(VOCABULARY), word_tokenizer(words())
    tokens = [1, 5, 6, 7]
    with torch.no_grad():
        for _ in range(8):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
    [text] = generate_texts(model, tokenizer, [[1, 5, 6, 7]], [4], GenerationConfig(num_beams=1, max_new_tokens=8))
    assert text == tokenizer.decode(tokens[4:], skip_special_tokens=True)


def test_a_decoder_without_a_first_token_is_refused() -> None:
    model = tiny_bart(VOCABULARY)
    model.config.decoder_start_token_id = None
    assert "decoder_start_token_id" in refusal(texts_of, model)


@pytest.mark.parametrize(
    ("form", "first"),
    [
        ("<s> $A </s>", 1),  # BART, and mBART-50 and NLLB with the language in its place
        ("$A </s>", None),  # T5, Marian, Pegasus
        ("$A </s> <s>", None),  # the first mBART: the language is last, and the decoder starts with it
        ("$A", None),
    ],
)
def test_what_every_target_begins_with(form: str, first: int | None) -> None:
    tokenizer = word_tokenizer(["b c"])  # "a" is unknown
    ids = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[pair for pair in ids if pair[0] in form]
    )
    assert first_target_token(tokenizer) == first


# ---- the length of a reply


def example(choices: tuple[str, ...], output: str = "the correct answer is {}") -> Example:
    instruction = f"Which?\n\nAnswer format: {'/'.join(choices)}"
    return Example(instruction, "", output.format(choices[0]), choices[0], choices, "arc_easy", "made-up:1")


def test_a_reply_may_be_as_long_as_the_longest_legal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = byte_tokenizer(), tiny_llama(259)
    short, long = example(("a", "b")), example(("a", "something much longer than twelve tokens"))
    assert longest_reply(short, tokenizer) == len("the correct answer is a") + 1
    assert longest_reply(long, tokenizer) == len(long.output_for(long.choices[1])) + 1
    asked = []
    generate = model.generate

    def spy(**inputs: Any) -> Any:
        config = inputs["generation_config"]
        asked.append((len(inputs["input_ids"]), config.max_new_tokens, inputs["input_ids"].shape[1]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", spy)
    evaluate_generation(model, tokenizer, [short, long, short], 8, 90)
    assert [(count, budget) for count, budget, _ in asked] == [(1, longest_reply(long, tokenizer)), (2, 24)]
    assert all(budget + width <= 90 for _, budget, width in asked)  # never behind max_length, which positions may end
    asked.clear()
    evaluate_generation(model, tokenizer, [short, long, short], 8, 90, max_new_tokens=5)
    assert [(count, budget) for count, budget, _ in asked] == [(3, 5)]


def test_what_the_evaluation_would_refuse_is_refused_before_the_training() -> None:
    tokenizer = byte_tokenizer()
    check_questions([example(("a", "b"))], tokenizer, 40)
    assert "max_length=20 must be larger" in refusal(check_questions, [example(("a", "b"))], tokenizer, 20)
    same = word_tokenizer(["the correct answer is"])
    with pytest.raises(UserError, match="made-up:1: two of the choices a, b have the same tokens"):
        check_questions([example(("a", "b"))], same, 400)
    prompts = prompt_tokens(example(("a", "b")), tokenizer, 40)
    assert len(prompts) == 16
