"""ROUGE of generated summaries.

ROUGE-1, 2, L and Lsum are F1 by Google's ``rouge-score`` with Porter stemming, as in published results, averaged over
rows, 0 to 100. Lsum compares sentence by sentence; sentences end at line breaks and after ``.``, ``!`` or ``?`` with a
space behind it (the usual splitter needs data that cannot be installed by pip).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from adalora_dist.data.batches import collate_pairs
from adalora_dist.data.encoding import padding_token
from adalora_dist.errors import UserError
from adalora_dist.evaluation.results import Gather, dealt_batches, evaluating, gather_lists
from adalora_dist.recipe_config import GenerationConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Summaries(NamedTuple):
    """Scores, 0 to 100, and the generated texts in the order of the rows."""

    scores: dict[str, float]
    texts: list[str]


def evaluate_summaries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    settings: GenerationConfig,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = gather_lists,
    synced_gpus: bool = False,
) -> Summaries:
    """Beam search over all rows, dealt out to the ranks, and ROUGE against the column summary.

    Every rank must call it with the same rows and returns the same result, which does not depend on ``world_size``.

    Args:
        rows: with the columns input_ids, length and summary.
        synced_gpus: ranks take the same number of decoding steps; needed where forwards are collective.
    """
    scorer = rouge_scorer()
    padding = padding_token(tokenizer)
    lengths = rows["length"][:]
    # Longest first: what does not fit into memory fails at once.
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    local: list[tuple[int, str, tuple[float, ...]]] = []
    with evaluating(model) as device:
        for indices, counts in dealt_batches(order, settings.eval_batch_size, rank, world_size, "generate"):
            batch = [rows[index] for index in indices]
            sources = collate_pairs(batch, padding)
            generated = cast(Any, model).generate(  # transformers' own annotations lack it
                input_ids=sources["input_ids"].to(device),
                attention_mask=sources["attention_mask"].to(device),
                **generation_arguments(settings, tokenizer),
                synced_gpus=synced_gpus,
            )
            texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
            if counts:
                local += [
                    (index, text, rouge(scorer, row["summary"], text))
                    for index, row, text in zip(indices, batch, texts, strict=True)
                ]
    gathered = sorted(gather(local))
    means = (100 * math.fsum(scores) / len(rows) for scores in zip(*(scores for *_, scores in gathered), strict=True))
    return Summaries(dict(zip(METRICS, means, strict=True)), [text for _, text, _ in gathered])


def generation_arguments(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What ``generate`` gets besides its inputs; sampling settings that a model ships with are put aside."""
    beams = {"length_penalty": settings.length_penalty, "early_stopping": True} if settings.num_beams > 1 else {}
    return {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "num_beams": settings.num_beams,
        "max_new_tokens": settings.max_new_tokens,
        "max_length": None,
        "min_new_tokens": settings.min_new_tokens or None,
        "min_length": 0,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "pad_token_id": padding_token(tokenizer),
        "use_cache": True,
        **beams,
    }


def rouge_scorer() -> Any:
    """The scorer of all four metrics.

    Raises:
        UserError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("ROUGE needs the package rouge-score: pip install 'adalora-dist[eval]'") from error
    return RougeScorer(list(METRICS), use_stemmer=True)


def rouge(scorer: Any, reference: str, text: str) -> tuple[float, ...]:
    """F1 of each metric for one summary, 0 to 1."""
    scores: Mapping[str, Any] = scorer.score(_by_sentence(reference), _by_sentence(text))
    return tuple(scores[metric].fmeasure for metric in METRICS)


def _by_sentence(text: str) -> str:
    return re.sub(r"(?<=[.!?]) +", "\n", text)
