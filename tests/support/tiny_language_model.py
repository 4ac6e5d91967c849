"""Tokenizers and causal language models small enough to be built inside a test."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


def byte_tokenizer(bos: bool = True, eos: bool = True, pad: bool = True, adds_eos: bool = False):
    """One token per byte, ids 3 to 258; with ``bos`` it puts BOS first by itself, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(SPECIAL | {byte: 3 + index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    pieces = ["<s>"] * bos + ["$A"] + ["</s>"] * adds_eos
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(pieces), special_tokens=[(token, SPECIAL[token]) for token in pieces if token != "$A"]
    )
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None, "pad_token": "<pad>"}
    if not pad:
        del names["pad_token"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v})


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark of ``texts``; anything else is unknown."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = SPECIAL | {"<unk>": 3} | {word: 4 + index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_llama(vocabulary_size: int, hidden_size: int = 32) -> LlamaForCausalLM:
    """Two layers with random weights that are always the same, float32, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.5,  # the default of 0.02 makes every prediction of so small a model alike
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """With Conv1D, biases and an odd width."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=18, n_layer=2, n_head=2, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    """Of twelve tokens, (1, 12, vocabulary)."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15)[None]).logits
