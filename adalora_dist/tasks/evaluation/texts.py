"""Generating a text for every row, dealt out to the ranks: for encoder-decoders and causal models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch

from adalora_dist.backbones.merging import merged
from adalora_dist.config.generation import GenerationConfig
from adalora_dist.tasks.batches import pad_columns
from adalora_dist.tasks.evaluation.batches import Gather, dealt_batches, evaluating, gather_lists
from adalora_dist.tasks.evaluation.decoding import decoding
from adalora_dist.tasks.rows.tokens import padding_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Sequence[int]],
    lengths: Sequence[int],
    settings: GenerationConfig,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = gather_lists,
    synced_gpus: bool = False,
    description: str = "generate",
    closing: Sequence[int] = (),
) -> list[str]:
    """Greedy or beam search from every source; the texts in the order of the sources, without special tokens.

    Every rank must call it with the same sources and returns the same texts, which do not depend on ``world_size``.

    Args:
        sources: tokens of the documents (encoder-decoder) or prompts (causal model).
        lengths: of the sources, or numbers that order them like that.
        synced_gpus: ranks take the same number of decoding steps; needed where forwards are collective (sharded
            parameters), harmful nowhere but in speed. It needs a process group.
        closing: tokens that end a text as EOS does.
    """
    padding, is_causal = padding_token(tokenizer), not cast(Any, model).config.is_encoder_decoder
    # Longest first: what does not fit into memory fails at once.
    order = sorted(range(len(sources)), key=lambda index: -lengths[index])
    # Models have more embeddings than tokens. Slow tokenizers fail on ids that no token has; fast ones say nothing.
    known = None if tokenizer.is_fast else {*tokenizer.get_vocab().values(), *tokenizer.all_special_ids}
    local: list[tuple[int, str]] = []
    merging = merged(model) if settings.merge_to_generate else nullcontext()
    with evaluating(model) as device, decoding(model, tokenizer, settings, closing) as config, merging:
        for indices, counts in dealt_batches(order, settings.eval_batch_size, rank, world_size, description):
            batch = [sources[index] for index in indices]
            if is_causal:
                input_ids, attention_mask = left_padded(batch, padding)
            else:
                padded = pad_columns([{"input_ids": source} for source in batch], padding, ["input_ids"])
                input_ids, attention_mask = padded["input_ids"], padded["attention_mask"]
            generated = cast(Any, model).generate(  # transformers' own annotations lack it
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
                synced_gpus=synced_gpus,
            )
            if counts:
                new = generated[:, input_ids.shape[1] :] if is_causal else generated
                ids = [[token for token in row if known is None or token in known] for row in new.tolist()]
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                local += zip(indices, texts, strict=True)
    texts_by_index = dict(gather(local))
    return [texts_by_index[index] for index in range(len(sources))]


def left_padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` [prompts, longest], every prompt ending in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    gaps = [longest - len(prompt) for prompt in prompts]
    input_ids = torch.tensor([[padding] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)])
    attention_mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    return input_ids, attention_mask
