"""Replies to a few fixed prompts, before and after the training, beside those in the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST = 800  # characters of a text on the console; samples.json has all


class Sample(NamedTuple):
    """Tokens of a prompt, with the generation prompt behind it, and the data's reply."""

    prompt: list[int]
    reply: str


class Outcome(TypedDict):
    """What an evaluation has found: scores by name, and the reply to each sample's prompt."""

    scores: dict[str, float]
    replies: list[str]


def share_exact(replies: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """``exact_replies``: the share of the replies that are the data's, but for blanks around them; no samples: {}."""
    if not samples:
        return {}
    pairs = zip(replies, samples, strict=True)
    return {"exact_replies": sum(reply.strip() == sample.reply.strip() for reply, sample in pairs) / len(samples)}


def records_of(
    samples: Sequence[Sample], found: Mapping[str, Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """Prompt, reply in the data, and of each occasion in ``found`` its entry in ``replies``, by sample."""
    records = []
    for index, sample in enumerate(samples):
        record = {"prompt": str(tokenizer.decode(sample.prompt)), "in the data": sample.reply}
        records.append(record | {when: had["replies"][index] for when, had in found.items() if had})
    return records


def samples_text(records: Sequence[Mapping[str, str]]) -> str:
    """The records for the console."""
    parts = []
    for number, record in enumerate(records, start=1):
        parts.append(f"\nSample {number}")
        for name, text in record.items():
            text = text.strip()
            cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
            parts.append(f"{name:>12}: " + cut.replace("\n", "\n" + " " * 14))
    return "\n".join(parts)
