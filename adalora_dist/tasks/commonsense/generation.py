"""Accuracy by generation: greedy decoding, then looking for the name of a choice in the text.

A text without one is a parse failure: counted, wrong, and never replaced by a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from adalora_dist.config.generation import GenerationConfig
from adalora_dist.tasks.commonsense.prompts import longest_reply, prompts_of
from adalora_dist.tasks.commonsense.results import TaskResult, task_result
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.evaluation.batches import Gather, gather_lists
from adalora_dist.tasks.evaluation.texts import generate_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAD = re.compile(r"the correct answer is", re.IGNORECASE)


def evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    max_length: int,
    max_new_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = gather_lists,
    synced_gpus: bool = False,
    show: Callable[[Sequence[Example], Sequence[str]], None] | None = None,
    merge_to_generate: bool = False,
) -> TaskResult:
    """Generate and parse a reply to every example (all of one task).

    Every rank must call it with the same examples and returns the same result.

    Args:
        batch_size: sequences in one call of ``generate`` of one rank.
        max_length: as in training; see ``prompt_tokens``.
        max_new_tokens: length of a reply; it ends earlier with EOS. None: as many tokens as the longest legal reply to
            the question has, with EOS, which is also the room that ``prompt_tokens`` leaves for it in ``max_length``.
        synced_gpus: see :func:`~adalora_dist.tasks.evaluation.texts.generate_texts`.
        show: is given the examples and the replies to them.
        merge_to_generate: see :class:`~adalora_dist.config.generation.DecodingConfig`.
    """
    budgets = [max_new_tokens or longest_reply(example, tokenizer) for example in examples]
    all_prompts = prompts_of(examples, tokenizer, max_length, show_progress=False)
    replies = [""] * len(examples)
    for budget in sorted(set(budgets), reverse=True):
        indices = [index for index, own in enumerate(budgets) if own == budget]
        prompts = [all_prompts[index] for index in indices]
        texts = generate_texts(
            model,
            tokenizer,
            prompts,
            [len(prompt) for prompt in prompts],
            GenerationConfig(
                num_beams=1, max_new_tokens=budget, eval_batch_size=batch_size, merge_to_generate=merge_to_generate
            ),
            rank,
            world_size,
            gather,
            synced_gpus,
            f"{examples[0].task} generation",
        )
        for index, text in zip(indices, texts, strict=True):
            replies[index] = text
    if show is not None:
        show(examples, replies)
    answers = [parse_answer(reply, example.choices) for reply, example in zip(replies, examples, strict=True)]
    return task_result(examples, "generation", answers)


def parse_answer(text: str, choices: Sequence[str]) -> str | None:
    """The first choice that stands in ``text`` as a whole word, after 'the correct answer is' where that occurs.

    Choices are matched in their exact spelling: an untrained model that echoes the list 'Answer1: ... Answer2: ...'
    has not answered. None: no choice there.
    """
    lead = _LEAD.search(text)
    # Longest first, so that a choice that begins with another one is found.
    names = "|".join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))
    match = re.compile(rf"(?<!\w)(?:{names})(?!\w)").search(text, lead.end() if lead else 0)
    return match.group() if match else None
