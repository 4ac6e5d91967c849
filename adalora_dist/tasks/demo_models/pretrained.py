"""The built-in text models: a BART and a GPT-2 of 0.4M parameters, pre-trained here on built-in texts.

The package index has neither, so they are made on the spot, in a minute or two on two cores, once; later calls find
them in the user's cache. One word is one token. What fine-tuning teaches them they have not seen:

- the BART learns by its own objective (arXiv 1910.13461, section 2.2: shuffled sentences, spans of words replaced by
  one mask) to say a built-in report again, and never sees a summary;
- the GPT-2 reads descriptions of built-in places, two of each place in other words, and never sees the lists of facts
  that it will have to describe.

Importing this file is cheap: torch and transformers are imported only when a folder has to be built.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalora_dist.io.digest import digest_of
from adalora_dist.io.progress import progress_bar
from adalora_dist.tasks.demo_models.built_once import built_once
from adalora_dist.tasks.e2e.demo import demo_places, describe, places
from adalora_dist.tasks.e2e.rows import prompt_text
from adalora_dist.tasks.rows.tokens import IGNORED
from adalora_dist.tasks.rows.towns import SEED, TOWNS
from adalora_dist.tasks.summarization.demo import Report, demo_reports, reports

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NUM_STEPS = 300
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
MASK_PROBABILITY = 0.12
"""Of a masked span to begin at a word."""
LONGEST_SPAN = 4
MAX_LENGTH = 128
BART_SHAPE = {
    "d_model": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
    "max_position_embeddings": MAX_LENGTH,
    "dropout": 0.0,
    "init_std": 0.05,
}
GPT2_SHAPE = {
    "n_embd": 96,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": MAX_LENGTH,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.05,
}
_PAD, _BOS, _EOS = 0, 1, 2
_SPECIAL = {"<pad>": _PAD, "<s>": _BOS, "</s>": _EOS, "<unk>": 3, "<mask>": 4}
_IDS = {"pad_token_id": _PAD, "bos_token_id": _BOS, "eos_token_id": _EOS}


def demo_bart_folder(say: Callable[[str], None] = print) -> Path:
    """The folder of the demonstration's encoder-decoder, pre-trained the first time; see :func:`_pretrained_once`."""
    known = [text for split in ("train", "test") for report in demo_reports(split) for text in report]
    known += [report.document for report in islice(_reports(), 2000)]
    return _pretrained_once("demo-bart", BART_SHAPE, known, _build_bart, say)


def demo_gpt2_folder(say: Callable[[str], None] = print) -> Path:
    """The folder of the demonstration's causal model, pre-trained the first time; see :func:`_pretrained_once`."""
    rows = demo_places("train") + demo_places("test")
    known = [text for facts, description in rows for text in (prompt_text(facts), description)]
    known += list(islice(_descriptions(), 2000))
    return _pretrained_once("demo-gpt2", GPT2_SHAPE, known, _build_gpt2, say)


def _pretrained_once(
    name: str,
    shape: Mapping[str, Any],
    texts: list[str],
    pretrain: Callable[[PreTrainedTokenizerFast, Callable[[str], None]], PreTrainedModel],
    say: Callable[[str], None],
) -> Path:
    """``pretrain`` of a tokenizer for all words of ``texts``, saved in the user's cache.

    The folder's name holds a digest of texts and settings, so another version of this file never meets an old model.

    Raises:
        UserError: the cache cannot be written.
    """

    def build(folder: Path, scratch: Path) -> None:
        tokenizer = word_tokenizer(texts)
        pretrain(tokenizer, say).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    settings = [shape, texts, NUM_STEPS, BATCH_SIZE, LEARNING_RATE, MASK_PROBABILITY, LONGEST_SPAN]
    digest = digest_of([json.dumps(settings).encode()])[:8]
    return built_once(f"{name}-{digest}", build, "demonstration model")


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark of ``texts``, the rest unknown; ``<s>`` and ``</s>`` around every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = _SPECIAL | {word: len(_SPECIAL) + index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", _BOS), ("</s>", _EOS)]
    )
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **names)


def noised(document: str, draw: random.Random) -> str:
    """The document with its sentences in random order and spans of 1 to ``LONGEST_SPAN`` words as ``<mask>``."""
    sentences = re.split(r"(?<=\.) ", document)
    draw.shuffle(sentences)
    words, noisy = " ".join(sentences).split(" "), []
    while words:
        masked = draw.random() < MASK_PROBABILITY
        noisy.append("<mask>" if masked else words[0])
        del words[: draw.randint(1, LONGEST_SPAN) if masked else 1]
    return " ".join(noisy)


def _reports() -> Iterator[Report]:
    return reports(f"{SEED} pre-training", TOWNS)


def _descriptions() -> Iterator[str]:
    """Two descriptions of one place in other words, without end."""
    for facts, draw in places(f"{SEED} pre-training", TOWNS):
        yield " ".join(describe(facts, draw) for _ in range(2))


def _build_bart(tokenizer: PreTrainedTokenizerFast, say: Callable[[str], None]) -> PreTrainedModel:
    from transformers import BartConfig, BartForConditionalGeneration

    stream, draw = _reports(), random.Random(f"{SEED} noise")
    config: Any = {"vocab_size": len(tokenizer), **_IDS, **BART_SHAPE}
    config |= {"decoder_start_token_id": _EOS, "forced_eos_token_id": None}

    def batch() -> dict[str, torch.Tensor]:
        documents = [report.document for report in islice(stream, BATCH_SIZE)]
        sources = tokenizer([noised(document, draw) for document in documents], padding=True, return_tensors="pt")
        labels = tokenizer(documents, padding=True, return_tensors="pt")["input_ids"]
        return {"input_ids": sources["input_ids"], "attention_mask": sources["attention_mask"], "labels": labels}

    return _pretrained(lambda: BartForConditionalGeneration(BartConfig(**config)), batch, say)


def _build_gpt2(tokenizer: PreTrainedTokenizerFast, say: Callable[[str], None]) -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    stream = _descriptions()
    config: Any = {"vocab_size": len(tokenizer), **_IDS, **GPT2_SHAPE}

    def batch() -> dict[str, torch.Tensor]:
        texts = tokenizer(list(islice(stream, BATCH_SIZE)), padding=True, return_tensors="pt")
        ids = texts["input_ids"]
        return {"input_ids": ids, "attention_mask": texts["attention_mask"], "labels": ids}

    return _pretrained(lambda: GPT2LMHeadModel(GPT2Config(**config)), batch, say)


def _pretrained(
    make: Callable[[], PreTrainedModel], batch: Callable[[], dict[str, torch.Tensor]], say: Callable[[str], None]
) -> PreTrainedModel:
    """A new model, trained for NUM_STEPS on batches whose labels still have padding; always from the same weights."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make()
    say(f"Pre-training the demonstration model, {model.num_parameters():,} parameters, once: {NUM_STEPS} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in progress_bar(range(NUM_STEPS), desc="pre-train", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * (1 - step / NUM_STEPS)
        tensors = batch()
        tensors["labels"] = tensors["labels"].masked_fill(tensors["labels"] == _PAD, IGNORED)
        loss = model(**tensors).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    say(f"Pre-trained to a loss of {loss.item():.2f} per word")
    return model
