"""A LLaMA of random weights, and a tokenizer for it: built once, as a plain transformers folder in the cache.

Being a folder like any other, it is loaded in shares by every process, merged into and exported as other backbones are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalora_dist.io.digest import digest_of
from adalora_dist.io.errors import UserError, reason_of
from adalora_dist.tasks.demo_models.built_once import built_once
from adalora_dist.tasks.pretrain.config import PretrainConfig, PretrainDataConfig, Size
from adalora_dist.tasks.pretrain.documents import documents, sources_of
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.token_cache import rules_of

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

SHAPES: dict[Size, dict[str, int]] = {
    "demo": {"hidden": 96, "intermediate": 256, "layers": 4, "heads": 4, "vocabulary": 512},
    "60m": {"hidden": 512, "intermediate": 1376, "layers": 8, "heads": 8, "vocabulary": 32000},
    "130m": {"hidden": 768, "intermediate": 2048, "layers": 12, "heads": 12, "vocabulary": 32000},
    "350m": {"hidden": 1024, "intermediate": 2736, "layers": 24, "heads": 16, "vocabulary": 32000},
    "1b": {"hidden": 2048, "intermediate": 5461, "layers": 24, "heads": 32, "vocabulary": 32000},
}
"""As the GaLore paper's models (its files have 24 layers and 32 heads at 1B, its table the two exchanged)."""
_TOKENIZER_CHARACTERS = 10_000_000
"""From the beginning of the data, what a tokenizer is made from."""
_SPECIAL = ("<pad>", "<s>", "</s>")


def architecture(size: Size, num_positions: int, tokenizer: PreTrainedTokenizerBase | None = None) -> LlamaConfig:
    """The model's configuration; with a tokenizer that has more tokens than the shape says, with an embedding for each.

    Args:
        num_positions: of the longest sequence.
    """
    from transformers import LlamaConfig

    shape = SHAPES[size]
    special: dict[str, Any] = {}
    if tokenizer is not None:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return LlamaConfig(
        hidden_size=shape["hidden"], intermediate_size=shape["intermediate"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], vocab_size=max(shape["vocabulary"], len(tokenizer or ())),
        max_position_embeddings=max(1024, num_positions), rms_norm_eps=1e-6, initializer_range=0.02,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], **special,
    )  # fmt: skip


def fresh_model_folder(config: PretrainConfig, say: Callable[[str], None]) -> Path:
    """The folder of a new model for this run: of its size, tokenizer and seed.

    Raises:
        UserError: the tokenizer cannot be had or has no end of text, or the cache cannot be written.
    """
    tokenizer = _tokenizer(config, say)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer={config.model.tokenizer}: it has no end-of-text token, which is to part documents; take another"
        )
    own = architecture(config.model.size, config.data.max_length, tokenizer)
    described = [own.to_diff_dict(), type(tokenizer).__name__, rules_of(tokenizer), config.train.seed]
    digest = digest_of([json.dumps(described, default=str, sort_keys=True).encode()])[:16]

    def build(folder: Path, scratch: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            LlamaForCausalLM(own).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return built_once(f"llama-{config.model.size}-{digest}", build, "model of random weights")


def write_architecture(config: PretrainConfig, folder: Path) -> tuple[str, int]:
    """Write the new model's configuration as ``folder/NAME.json``, for a dry run; neither text nor weights are read.

    Returns:
        NAME, and the sequences that the run trains on.

    Raises:
        UserError: neither num_tokens nor max_steps says how long it is.
    """
    if config.num_steps is None:
        raise UserError("dry_run: without reading the text only num_tokens or max_steps says the length: set one")
    name = f"llama-{config.model.size}"
    own = architecture(config.model.size, config.data.max_length)
    (folder / f"{name}.json").write_text(own.to_json_string(use_diff=False))
    return name, config.num_steps * config.train.batch_size


def _tokenizer(config: PretrainConfig, say: Callable[[str], None]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = config.model.tokenizer
    if not name:
        folder = _made_tokenizer(config.data, SHAPES[config.model.size]["vocabulary"], config.data.bad_rows, say)
        return AutoTokenizer.from_pretrained(folder)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as in load_backbone
        raise UserError(
            f"tokenizer={name}: it cannot be had ({reason_of(error, 200)}): give a local folder, or leave it out, "
            "and one is made from the data"
        ) from error


def _made_tokenizer(data: PretrainDataConfig, vocabulary: int, policy: Any, say: Callable[[str], None]) -> Path:
    """A byte-level BPE of the data's beginning."""
    source, _ = sources_of(data)
    described = [vocabulary, data.column, policy, _TOKENIZER_CHARACTERS]
    digest = digest_of([json.dumps(described).encode(), *source.identity()])[:16]

    def build(folder: Path, scratch: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=list(_SPECIAL), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        backend.train_from_iterator(_beginning(documents(source, data.column, BadRows("skip"))), trainer)
        pad, bos, eos = _SPECIAL
        PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos
        ).save_pretrained(folder)  # fmt: skip
        say(f"Tokenizer: {backend.get_vocab_size():,} tokens, made from the data")

    return built_once(f"bpe-{digest}", build, "tokenizer")


def _beginning(texts: Iterator[str]) -> Iterator[str]:
    left = _TOKENIZER_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
