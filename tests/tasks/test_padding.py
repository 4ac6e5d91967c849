"""Losses and scores do not depend on how batches are cut, whatever ids a tokenizer and a model pad with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from adalora_dist.tasks.commonsense.choices import evaluate_choices
from adalora_dist.tasks.commonsense.generation import evaluate_generation
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.evaluation.predict import predict
from adalora_dist.tasks.glue.rows import LabelledText, encode_texts
from adalora_dist.tasks.losses import classification_loss, span_loss
from adalora_dist.tasks.padding import padding_of, refuse_uneven_ends
from tests.support.refusals import refusal
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama

EOS = 2
SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "num_labels": 3, "initializer_range": 0.5}
BART: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_labels": 3, "init_std": 0.5,
    "eos_token_id": EOS, "decoder_start_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "num_labels": 3,
    "decoder_start_token_id": 0, "eos_token_id": EOS,
}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "num_labels": 3}
GPT2 |= {"initializer_range": 0.5, "eos_token_id": EOS}
MODELS: dict[str, Any] = {
    "decoder that pads with EOS": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=EOS)),
    "decoder that pads with another id": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=0)),
    "decoder that pads with a word": lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, pad_token_id=7)),
    "BERT": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "RoBERTa, positions by padding": lambda: RobertaForSequenceClassification(
        RobertaConfig(**SMALL, pad_token_id=1, max_position_embeddings=20)
    ),
    "BART": lambda: BartForSequenceClassification(BartConfig(**BART, pad_token_id=1)),
    "BART that pads with EOS": lambda: BartForSequenceClassification(BartConfig(**BART, pad_token_id=EOS)),
    "T5": lambda: T5ForSequenceClassification(T5Config(**T5, pad_token_id=0)),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def rows() -> list[dict[str, list[int]]]:
    """Of 3 to 17 tokens, all ending with EOS, with 0, 1 and 7 inside: ids that tokenizers pad with."""
    texts = [[5, 6], [9] * 15, [7, 7, 8, 7], [1, 30, 0, 31], [8, 7], [12, 13, 14, 0, 7], [33], [20, 21] * 6]
    return [{"input_ids": [4, *text, EOS]} for text in texts]


@every_model
@pytest.mark.parametrize("tokenizers", [0, 1, EOS, 7])
def test_logits_at_any_batch_size(kind: str, tokenizers: int) -> None:
    model = model_of(kind)
    [alone, pairs, together] = [predict(model, rows(), tokenizers, size) for size in (1, 2, 16)]
    with torch.no_grad():
        plain = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows()]
    assert torch.stack(plain).std(dim=0).max() > 0.1  # or all rows would look alike
    for expected, *found in zip(plain, alone, pairs, together, strict=True):
        for (logits,) in found:
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@every_model
def test_losses_at_any_batch_size(kind: str) -> None:
    model = model_of(kind)
    loss = classification_loss(rows(), [0, 1, 2, 0, 1, 2, 0, 1], 3, EOS, torch.device("cpu"))
    with torch.no_grad():
        alone = sum(loss(model, [index]) for index in range(8))
        torch.testing.assert_close(loss(model, list(range(8))), alone, rtol=1e-4, atol=1e-4)
        assert loss(model, []) == 0  # of a process that has no row in a micro-batch


def test_spans_at_any_batch_size() -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**(SMALL | {"num_labels": 2}), pad_token_id=5)).eval()
    loss = span_loss(rows(), [(1, 2)] * 8, 0, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(loss(model, list(range(8))), sum(loss(model, [k]) for k in range(8)))
    outputs = ("start_logits", "end_logits")
    one, many = (predict(model, rows(), 0, size, outputs=outputs) for size in (1, 16))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("pad", "vocabulary", "expected"), [(7, 40, 7), (None, 40, 3), (-1, 40, 3), (40, 40, 3), (0, 40, 0)]
)
def test_what_is_padded_with(pad: int | None, vocabulary: int, expected: int) -> None:
    config = LlamaConfig(**(SMALL | {"vocab_size": vocabulary}))
    model = LlamaForSequenceClassification(config)
    model.config.pad_token_id = pad
    assert padding_of(model, 3) == expected
    assert padding_of(torch.nn.DataParallel(model), 3) == expected  # under an engine's wrapper
    assert padding_of(torch.nn.Linear(2, 2), 3) == 3


def test_texts_that_spell_out_eos_are_refused_where_it_is_counted() -> None:
    uneven = [*rows(), {"input_ids": [4, EOS, 5, EOS]}]
    refuse_uneven_ends(model_of("BERT"), {"training": uneven})
    for kind in ("BART", "T5"):
        refuse_uneven_ends(model_of(kind), {"training": rows(), "dev": rows()})
        message = refusal(refuse_uneven_ends, model_of(kind), {"training": rows(), "dev": uneven})
        assert "row 9 of dev has 2 tokens EOS" in message
        assert "has 0 tokens EOS" in refusal(refuse_uneven_ends, model_of(kind), {"dev": [{"input_ids": [4, 5]}]})


def test_texts_without_tokens_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path))
    tokenizer = byte_tokenizer(bos=False)
    examples = [LabelledText(("a",), 0.0), LabelledText(("\u200b",), 0.0)]

    class Dropping(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[5] if text.isprintable() else [] for text in texts]}

    tokenizer.__class__ = Dropping
    assert r"row 2: the text '\u200b' has no tokens" in refusal(encode_texts, examples, tokenizer, 8, "tokens", False)


def test_scores_of_a_language_model_at_any_batch_size() -> None:
    questions = [
        Example(f"{'So. ' * k}Which?", "", "the answer is a", "a", ("a", "b", "c"), "arc_easy", f"made-up:{k}")
        for k in (0, 7, 3, 1, 12)
    ]
    model = tiny_llama(259)
    for tokenizer in (byte_tokenizer(), byte_tokenizer(pad=False), byte_tokenizer(eos=False, pad=False)):
        results = [
            (
                evaluate_choices(model, tokenizer, questions, size, 128),
                evaluate_generation(model, tokenizer, questions, size, 128),
            )
            for size in (1, 2, 16)
        ]
        assert results[0] == results[1] == results[2]
