"""Encoders, tokenizers and GLUE and SQuAD data small enough to be written, trained on and evaluated inside a test."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2Model, PreTrainedTokenizerFast

from adalora_dist.tasks.demo_models.pretrained import word_tokenizer

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
GOOD, BAD = ("lovely", "tasty", "clever", "quiet"), ("nasty", "rotten", "stupid", "loud")
THINGS = ("soup", "song", "book", "chair", "train", "park", "film", "cake")
PLACES = ("Oslo", "Lima", "Rome", "Bern", "Cairo", "Delhi")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_glue(folder: Path) -> None:
    """sst2 (one text, two classes), stsb (two texts, a number) and mnli (three classes, two evaluation sets)."""
    draw = random.Random(0)
    rows = [
        {"sentence": f"the {thing} is {'very ' * k}{word}", "label": int(word in GOOD)}
        for thing in THINGS
        for word in (*GOOD, *BAD)
        for k in range(2)
    ]
    draw.shuffle(rows)
    write_jsonl(folder / "sst2" / "train.jsonl", rows[:95])
    write_jsonl(folder / "sst2" / "dev.jsonl", rows[95:])
    pairs = [(draw.choice(rows)["sentence"], draw.choice(rows)["sentence"]) for _ in range(60)]
    for split, part in (("train", pairs[:40]), ("dev", pairs[40:])):
        overlap = [len(set(a.split()) & set(b.split())) for a, b in part]
        scored = [{"sentence1": a, "sentence2": b, "label": float(n)} for (a, b), n in zip(part, overlap, strict=True)]
        write_jsonl(folder / "stsb" / f"{split}.jsonl", scored)
    for split in ("train", "dev_matched", "dev_mismatched"):
        classes = [{"premise": a, "hypothesis": b, "label": draw.randrange(3)} for a, b in pairs[:30]]
        write_jsonl(folder / "mnli" / f"{split}.jsonl", classes)


def write_squad(folder: Path) -> None:
    """Ann lives in Oslo. Bob lives in Rome. ...: where does Bob live? Every fifth question has no answer (v2.0)."""
    draw = random.Random(0)
    names = ("Ann", "Bob", "Cid", "Dot")
    for split, count in (("train", 60), ("validation", 23)):
        rows = []
        for number in range(count):
            told = list(zip(draw.sample(names, 3), draw.sample(PLACES, 3), strict=True))
            context = " ".join(f"{name} lives in {place} ." for name, place in told)
            name, place = draw.choice(told)
            answers = {"text": [place], "answer_start": [context.index(place)]}
            if number % 5 == 4:
                name = next(n for n in names if n not in dict(told))
                answers = {"text": [], "answer_start": []}
            rows.append(
                {"id": str(number), "question": f"where does {name} live ?", "context": context, "answers": answers}
            )
        write_jsonl(folder / "v2" / f"{split}.jsonl", rows)
        write_jsonl(folder / "v1" / f"{split}.jsonl", [row for row in rows if row["answers"]["text"]])


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the data above; [CLS] a [SEP] b [SEP]."""
    words = "the is very lives in where does live Ann Bob Cid Dot . ?".split()
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words, *GOOD, *BAD, *THINGS, *PLACES))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def write_encoder(folder: Path, kind: str) -> None:
    """A backbone of two layers without a head, bert or deberta, with random weights that are always the same."""
    torch.manual_seed(0)
    tokenizer = encoder_tokenizer()
    size: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    if kind == "bert":
        model: Any = BertModel(BertConfig(**size))
    else:  # as DeBERTaV3: relative positions shared over layers, keys of position shared with those of content
        size |= {
            "relative_attention": True, "pos_att_type": "p2c|c2p", "share_att_key": True, "position_buckets": 16,
            "norm_rel_ebd": "layer_norm", "position_biased_input": False, "max_relative_positions": -1,
            "type_vocab_size": 0, "pooler_dropout": 0.0, "pooler_hidden_act": "gelu", "pooler_hidden_size": 32,
        }  # fmt: skip
        model = DebertaV2Model(DebertaV2Config(**size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sentence_encoder(folder: str, texts: list[str] | None = None) -> str:
    """Written to ``folder`` for sentence-transformers: two layers of BERT and the mean of their outputs."""
    from sentence_transformers import SentenceTransformer, models

    word_tokenizer(texts or ["a cat sits", "a dog runs"]).save_pretrained(f"{folder}/bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(f"{folder}/bert")
    transformer, pooling = models.Transformer(f"{folder}/bert"), models.Pooling(16, pooling_mode="mean")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(folder)
    return folder
