"""Tokenizers as folders have them: without files, and of SentencePiece without tokenizer.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizer

from adalora_dist.backbones.load import load_tokenizer
from adalora_dist.backbones.tokenizer import knows_words, save_tokenizer
from adalora_dist.config.generation import GenerationConfig
from adalora_dist.config.sections import ModelConfig
from adalora_dist.tasks.evaluation.texts import generate_texts
from adalora_dist.tasks.rows.token_cache import rules_of
from tests.support.refusals import refusal

TEXT = "the rain falls on Rome. 12"
SPECIAL = ("<s>", "</s>", "<unk>")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of a few words; beside it one of LLaMA's kind."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("the rain falls on Rome. It rains on hills in the north: 1 2 3\n" * 50)
    for kind in ("unigram", "bpe"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"), model_prefix=str(folder / kind), model_type=kind, minloglevel=2,
            **({"vocab_size": 60, "hard_vocab_limit": False} if kind == "unigram" else {"vocab_size": 45}),
        )  # fmt: skip
    return folder / "unigram.model"


def names_of(pieces: Path) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    return [model.id_to_piece(number) for number in range(model.get_piece_size())]


def write(folder: Path, kind: str, pieces: Path, model_type: str, *files: str) -> ModelConfig:
    """A folder that has the pieces under these names, and a vocabulary where the kind of tokenizer has one besides."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    for file in files:
        shutil.copy(pieces, folder / file)
    if kind == "MarianTokenizer":
        words = ["</s>", "<unk>", *(name for name in names_of(pieces) if name not in SPECIAL), "<pad>"]
        (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    return ModelConfig(name=str(folder))


KINDS: dict[str, tuple[str, ...]] = {
    "LlamaTokenizer": ("llama", "tokenizer.model"),
    "T5Tokenizer": ("t5", "spiece.model"),
    "DebertaV2Tokenizer": ("deberta-v2", "spm.model"),
    "XLMRobertaTokenizer": ("xlm-roberta", "sentencepiece.bpe.model"),
    "GPTSw3Tokenizer": ("gpt2", "spiece.model"),
    "BertGenerationTokenizer": ("bert-generation", "spiece.model"),
    "MarianTokenizer": ("marian", "source.spm", "target.spm"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_without_tokenizer_json(kind: str, pieces: Path, tmp_path: Path) -> None:
    model_type, *files = KINDS[kind]
    pieces = pieces.with_name("bpe.model") if kind == "LlamaTokenizer" else pieces
    tokenizer = load_tokenizer(write(tmp_path / "model", kind, pieces, model_type, *files))
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    assert type(tokenizer).__name__ == kind and tokenizer.tokenize(TEXT) == model.encode(TEXT, out_type=str)
    assert tokenizer.is_fast == (kind in list(KINDS)[:4])
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert rules_of(tokenizer) == rules_of(tokenizer)


def test_other_scores_of_the_same_pieces_are_another_tokenizer(pieces: Path, tmp_path: Path) -> None:
    """Or rows would be taken from the cache that were cut into other pieces."""
    first = load_tokenizer(write(tmp_path / "model", "GPTSw3Tokenizer", pieces, "gpt2", "spiece.model"))
    rules, tokens = rules_of(first), first(TEXT)["input_ids"]
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(pieces.read_bytes())
    for piece in model.pieces:
        piece.score *= 1 if len(piece.piece) == 1 else 50
    (tmp_path / "model" / "spiece.model").write_bytes(model.SerializeToString())
    other = load_tokenizer(ModelConfig(name=str(tmp_path / "model")))
    assert first.get_vocab() == other.get_vocab() and tokens != other(TEXT)["input_ids"]
    assert rules != rules_of(other)


@pytest.mark.parametrize("model_type", ["t5", "gemma", "bert", "roberta", "deberta-v2", "qwen2", "bart"])
def test_a_folder_without_a_tokenizer_is_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    line = refusal(load_tokenizer, ModelConfig(name=str(tmp_path)))
    assert "knows no word" in line and "put the model's tokenizer.json there" in line


@pytest.mark.parametrize("model_type", ["canine", "perceiver"])
def test_characters_and_bytes_need_no_files(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert len(load_tokenizer(ModelConfig(name=str(tmp_path)))(TEXT)["input_ids"]) == len(TEXT) + 2


class OwnTokenizer(PreTrainedTokenizer):
    """Code that came with a model: what it lists as its tokens."""

    listed: ClassVar[dict[Any, int]] = {}
    vocab_size = 2

    def get_vocab(self) -> Any:
        return self.listed


@pytest.mark.parametrize(("listed", "knows"), [({b"\x00": 0, b"a": 1}, True), ({" ": 0, "_": 1}, False)])
def test_a_word_may_be_bytes(listed: Any, knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = OwnTokenizer()
    monkeypatch.setattr(OwnTokenizer, "listed", listed)
    assert knows_words(tokenizer) is knows


def test_embeddings_without_a_token_are_no_text(pieces: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "model", "GPTSw3Tokenizer", pieces, "gpt2", "spiece.model"))
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer) + 5, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    )
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.fill_(1)
    model.transformer.wte.weight.data[-1] = 9  # and so whatever was read, the last one follows, which no token has
    prompts = [tokenizer(TEXT)["input_ids"], tokenizer("the rain")["input_ids"]]
    settings = GenerationConfig(max_new_tokens=3, eval_batch_size=2)
    assert generate_texts(model, tokenizer, prompts, [2, 1], settings) == ["", ""]
