"""The built-in encoder-decoder: a BART of 0.4M parameters, pre-trained here on built-in reports.

The package index has no BART, so this one is made on the spot: BART's own objective (arXiv 1910.13461, section 2.2:
shuffled sentences, spans of words replaced by one mask) on an endless stream of built-in reports without summaries,
for a minute or two on two cores, once; later calls find it in the user's cache. It knows the words of the reports and
how to say a report again. It has never seen a summary: that is what fine-tuning teaches it. One word is one token.

Importing this file is cheap: torch and transformers are imported only when the folder has to be built.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalora_dist.data.demo_model import cache_folder
from adalora_dist.data.demo_reports import SEED, TOWNS, Report, demo_reports, reports
from adalora_dist.errors import UserError
from adalora_dist.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_STEPS = 300
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
MASK_PROBABILITY = 0.12
"""Of a masked span to begin at a word."""
LONGEST_SPAN = 4
SHAPE = {
    "d_model": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "init_std": 0.05,
}
_PAD, _BOS, _EOS = 0, 1, 2
_SPECIAL = {"<pad>": _PAD, "<s>": _BOS, "</s>": _EOS, "<unk>": 3, "<mask>": 4}


def demo_seq2seq_folder(say: Callable[[str], None] = print) -> Path:
    """Return the folder of the demonstration model, pre-training it in the user's cache the first time.

    The folder's name holds a digest of texts and settings, so another version of this file never meets an old model.
    Any number of processes may call this at once: one builds under a file lock, the others wait and find the result.

    Raises:
        UserError: the cache cannot be written.
    """
    from filelock import FileLock

    settings = [list(islice(_texts(), 50)), demo_reports("train"), SHAPE, NUM_STEPS, BATCH_SIZE, LEARNING_RATE]
    digest = hashlib.sha256(json.dumps([*settings, MASK_PROBABILITY, LONGEST_SPAN]).encode()).hexdigest()
    cache = cache_folder()
    folder = cache / f"demo-bart-{digest[:8]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as scratch:
                    _build(Path(scratch) / "model", say)
                    (Path(scratch) / "model").rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot build the demonstration model in {cache}: {error.strerror or error}; set ADALORA_DIST_CACHE to a "
            "writable folder, or use another model: --model HUB_ID_OR_FOLDER"
        ) from error
    return folder


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
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=SHAPE["max_position_embeddings"], **names)


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


def _texts() -> Iterator[Report]:
    return reports(f"{SEED} pre-training", TOWNS)


def _build(folder: Path, say: Callable[[str], None]) -> None:
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    stream, draw = _texts(), random.Random(f"{SEED} noise")
    known = [text for split in ("train", "test") for report in demo_reports(split) for text in report]
    tokenizer = word_tokenizer(known + [report.document for report in islice(_texts(), 2000)])
    config: Any = {"vocab_size": len(tokenizer), "pad_token_id": _PAD, "bos_token_id": _BOS, "eos_token_id": _EOS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = BartForConditionalGeneration(
            BartConfig(**config, **SHAPE, decoder_start_token_id=_EOS, forced_eos_token_id=None)
        )
    say(f"Pre-training the demonstration model, {model.num_parameters():,} parameters, once: {NUM_STEPS} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in progress_bar(range(NUM_STEPS), desc="pre-train", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * (1 - step / NUM_STEPS)
        documents = [report.document for report in islice(stream, BATCH_SIZE)]
        sources = tokenizer([noised(document, draw) for document in documents], padding=True, return_tensors="pt")
        labels = tokenizer(documents, padding=True, return_tensors="pt")["input_ids"]
        loss = model(
            input_ids=sources["input_ids"],
            attention_mask=sources["attention_mask"],
            labels=labels.masked_fill(labels == _PAD, -100),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    say(f"Pre-trained to a loss of {loss.item():.2f} per word")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
