"""Tiny folders for the recipes that write text: a BART, a GPT-2, reports to summarise and facts to say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adalora_dist.tasks.demo_models.pretrained import word_tokenizer
from adalora_dist.tasks.e2e.demo import demo_places
from adalora_dist.tasks.e2e.rows import prompt_text
from adalora_dist.tasks.summarization.demo import demo_reports

NUM_TRAIN, NUM_TEST = 24, 7
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tiny_bart(vocab_size: int, max_positions: int = 96) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocab_size, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=max_positions,
            dropout=0.0, init_std=0.4, decoder_start_token_id=2, forced_eos_token_id=None, **IDS,
        )
    ).eval()  # fmt: skip


def write_summarization(folder: Path) -> tuple[Path, Path]:
    """(model folder, data folder)."""
    texts = []
    for split, num_rows in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        rows = demo_reports(split)[:num_rows]
        texts += [text for row in rows for text in row]
        write_jsonl(folder / "data" / "xsum" / f"{split}.jsonl", (row._asdict() for row in rows))
    tokenizer = word_tokenizer(texts)
    tokenizer.save_pretrained(folder / "model")
    tiny_bart(len(tokenizer)).save_pretrained(folder / "model")
    return folder / "model", folder / "data"


def write_t5(folder: Path) -> None:
    """A T5 in the place of the BART that :func:`write_summarization` has written, with its tokenizer."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(AutoTokenizer.from_pretrained(folder / "model")), d_model=24, d_ff=40, d_kv=12, num_layers=2,
            num_heads=2, dropout_rate=0.0, pad_token_id=0, eos_token_id=IDS["eos_token_id"], decoder_start_token_id=0,
        )
    ).save_pretrained(folder / "model")  # fmt: skip


def write_e2e(folder: Path) -> tuple[Path, Path]:
    """(model folder, data folder)."""
    texts = []
    for split, num_rows in (("train", NUM_TRAIN), ("test", 2 * NUM_TEST)):
        rows = demo_places(split)[:num_rows]
        texts += [text for mr, ref in rows for text in (prompt_text(mr), ref)]
        write_jsonl(folder / "data" / f"{split}.jsonl", ({"mr": mr, "ref": ref} for mr, ref in rows))
    tokenizer = word_tokenizer(texts)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=24, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    return folder / "model", folder / "data"
