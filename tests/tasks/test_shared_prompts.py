"""Evaluation by likelihood reads a prompt once for all choices; questions are tokenised many at a time, and once."""

from __future__ import annotations

from dataclasses import replace

import torch

from adalora_dist.tasks.commonsense.choices import _heads, evaluate_choices, reply_log_likelihoods
from adalora_dist.tasks.commonsense.prompts import (
    choice_tokens,
    encode_example,
    encode_examples,
    prompt_text,
    prompt_tokens,
    prompts_of,
)
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.rows.token_cache import rules_of
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama, word_tokenizer


def questions(choices: tuple[str, ...], count: int = 9) -> list[Example]:
    """Of unequal lengths."""
    listed = "/".join(choices)
    return [
        Example(f"Which {'very ' * (k % 5)}one is {k}? Answer format: {listed}", "", f"the answer is {answer}", answer,
                choices, "arc_easy", f"made-up:{k}")
        for k in range(count) for answer in [choices[k % len(choices)]]
    ]  # fmt: skip


def scored(examples, tokenizer, batch_size=4):
    """(scores by (row, choice), tokens that the model has read, without padding)."""
    model, found, read = tiny_llama(len(tokenizer)), [], []

    def forward(*arguments, _do=model.forward, **inputs):
        read.append(int(inputs["input_ids"].numel()))
        return _do(*arguments, **inputs)

    vars(model)["forward"] = forward
    forward.__signature__ = __import__("inspect").signature(type(model).forward)
    evaluate_choices(model, tokenizer, examples, batch_size, 512, gather=lambda items: found.extend(items) or items)
    del vars(model)["forward"]
    with torch.no_grad():
        expected = {
            (k, choice): float(reply_log_likelihoods(
                model, [prompt_tokens(e, tokenizer, 512)], [reply], 0, torch.device("cpu")))
            for k, e in enumerate(examples) for choice, reply in enumerate(choice_tokens(e, tokenizer))
        }  # fmt: skip
    return {(k, c): total for k, c, total in found}, expected, sum(read)


def test_choices_of_one_last_token_cost_one_sequence():
    examples = questions(("answer1", "answer2", "answer3", "answer4"))
    tokenizer = byte_tokenizer()
    found, expected, read = scored(examples, tokenizer, 1)
    assert found.keys() == expected.keys()
    assert all(abs(found[key] - expected[key]) < 6e-6 * abs(expected[key]) for key in found)
    bound = sum(len(prompt_tokens(e, tokenizer, 512)) + len(choice_tokens(e, tokenizer)[0]) - 1 for e in examples)
    assert read <= 1.05 * bound


def test_padding_is_little_and_any_batch_has_the_same_scores():
    examples = questions(("answer1", "answer2"), 24)
    tokenizer = byte_tokenizer()
    alone, _, bound = scored(examples, tokenizer, 1)
    together, _, read = scored(examples, tokenizer, 8)
    assert read <= 1.05 * bound
    assert all(abs(alone[key] - together[key]) < 6e-6 * abs(alone[key]) for key in alone)


def test_other_choices_are_sequences_of_their_own():
    examples = questions(("yes", "not at all", "not in time"))
    tokenizer = byte_tokenizer()
    found, expected, _ = scored(examples, tokenizer)
    assert all(abs(found[key] - expected[key]) < 6e-6 * abs(expected[key]) for key in expected)
    assert list(_heads([(1, 2, 3), (1, 2, 4), (5,), (1, 6)]).items()) == [
        ((1, 2), [(0, 3), (1, 4)]), ((), [(2, 5)]), ((1,), [(3, 6)]),
    ]  # fmt: skip


def test_many_at_a_time_are_the_tokens_of_each_and_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    examples = questions(("answer1", "answer2"), 40)
    words = word_tokenizer([text for e in examples for text in (prompt_text(e), *map(e.output_for, e.choices))])
    for tokenizer in (byte_tokenizer(), byte_tokenizer(adds_eos=True), words):
        for max_length in (60, 512):
            rows = [encode_example(e, tokenizer, max_length) for e in examples]
            for _ in range(2):
                assert encode_examples(examples, tokenizer, max_length) == rows
            assert prompts_of(examples, tokenizer, max_length) == [
                prompt_tokens(e, tokenizer, max_length) for e in examples
            ]
    calls = []
    monkeypatch.setattr(type(words), "__call__", lambda *a, **k: calls.append(a) or 1 / 0)
    prompts_of(examples, words, 512)
    assert not calls  # all from the cache
    changed = [replace(examples[0], input="more"), *examples[1:]]
    try:
        prompts_of(changed, words, 512)
    except ZeroDivisionError:
        calls.append("tokenised")
    assert calls


def test_tokens_in_the_cache_are_those_of_this_end_of_text_and_this_side():
    tokenizer = byte_tokenizer()
    known = [rules_of(tokenizer)]
    tokenizer.eos_token = tokenizer.pad_token  # no token is new: the backend is as it was
    known.append(rules_of(tokenizer))
    tokenizer.truncation_side = "left"
    known.append(rules_of(tokenizer))
    assert known[0] != known[1] != known[2]
