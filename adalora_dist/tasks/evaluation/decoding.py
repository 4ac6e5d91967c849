"""How texts for scores are decoded: by this run's settings alone, whatever the model's generation_config.json says.

``generate`` fills every setting that it is not given from the model's own file, so that a repetition penalty or a list
of forbidden words there would change a score. Here a model has no such file while it generates. What it keeps are facts
of its vocabulary, taken from its tokenizer and config.json: the ids of padding, of begin and end, and of what a decoder
reads first. Everything else is a choice: sampling, beams, penalties, suppressed and forced tokens, stop strings,
lengths, caches.

A token that every target begins with (BART's ``<s>``, the language of mBART-50 and NLLB) is given to the decoder, as
training does. It is what the tokenizer puts there, not what ``forced_bos_token_id`` says: for another language, set the
tokenizer's target language.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from adalora_dist.config.generation import GenerationConfig
from adalora_dist.tasks.losses import decoder_start_token
from adalora_dist.tasks.rows.tokens import eos_tokens, padding_token

if TYPE_CHECKING:
    import transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def decoding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationConfig,
    closing: Sequence[int] = (),
) -> Iterator[transformers.GenerationConfig]:
    """What to give to ``generate``; until the end, the model has no other settings of its own.

    Args:
        closing: tokens that end a text besides EOS.

    Raises:
        UserError: an encoder-decoder's configuration does not say what the decoder reads first.
    """
    ours, own = _decoding_of(model, tokenizer, settings, closing), model.generation_config
    cast(Any, model).generation_config = ours
    try:
        yield ours
    finally:
        cast(Any, model).generation_config = own


def _decoding_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig, closing: Sequence[int]
) -> transformers.GenerationConfig:
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {
        "do_sample": False,
        "num_beams": settings.num_beams,
        "max_new_tokens": settings.max_new_tokens,
        "min_new_tokens": settings.min_new_tokens or None,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "use_cache": True,
    }
    if settings.num_beams > 1:
        chosen |= {"length_penalty": settings.length_penalty, "early_stopping": True}
    eos = tokenizer.eos_token_id
    others = [token for token in closing if token != eos]
    facts: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [*eos_tokens(tokenizer), *others] if others else eos,
        "pad_token_id": padding_token(tokenizer),
    }
    if cast(Any, model).config.is_encoder_decoder:
        facts["decoder_start_token_id"] = decoder_start_token(model)
        facts["forced_bos_token_id"] = first_target_token(tokenizer)
    return GenerationConfig(**chosen, **facts)


def first_target_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every target; None if targets begin with their first word."""
    nothing, something = (tokenizer(text_target=text)["input_ids"] for text in ("", "a"))
    return nothing[0] if nothing and nothing[0] == something[0] else None
