"""Accuracy by generation: greedy decoding, then looking for the name of a choice in the text.

A text without one is a parse failure: counted, wrong, and never replaced by a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from adalora_dist.tasks.commonsense.prompts import prompt_text, prompt_tokens
from adalora_dist.tasks.commonsense.results import TaskResult, task_result
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.evaluation.batches import Gather, dealt_batches, evaluating, gather_lists
from adalora_dist.tasks.evaluation.texts import left_padded
from adalora_dist.tasks.rows.tokens import padding_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAD = re.compile(r"the correct answer is", re.IGNORECASE)


def evaluate_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    max_length: int,
    max_new_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = gather_lists,
    synced_gpus: bool = False,
) -> TaskResult:
    """Generate and parse a reply to every example (all of one task).

    Every rank must call it with the same examples and returns the same result.

    Args:
        batch_size: sequences in one call of ``generate`` of one rank.
        max_length: as in training; see ``prompt_tokens``.
        max_new_tokens: length of a reply; it ends earlier with EOS.
        synced_gpus: ranks take the same number of decoding steps; needed where forwards are collective (sharded
            parameters), harmful nowhere but in speed. It needs a process group.
    """
    order = sorted(range(len(examples)), key=lambda index: -len(prompt_text(examples[index])))
    padding = padding_token(tokenizer)
    local: list[tuple[int, str | None]] = []
    with evaluating(model) as device:
        for batch, counts in dealt_batches(order, batch_size, rank, world_size, f"{examples[0].task} generation"):
            prompts = [prompt_tokens(examples[index], tokenizer, max_length) for index in batch]
            input_ids, attention_mask = left_padded(prompts, padding)
            generated = cast(Any, model).generate(  # transformers' own annotations lack it
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                do_sample=False,
                num_beams=1,
                temperature=None,  # sampling settings that a model ships with draw a warning in greedy decoding
                top_p=None,
                top_k=None,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=padding,
                synced_gpus=synced_gpus,
            )
            texts = tokenizer.batch_decode(generated[:, input_ids.shape[1] :], skip_special_tokens=True)
            if counts:
                local += [
                    (index, parse_answer(text, examples[index].choices))
                    for index, text in zip(batch, texts, strict=True)
                ]
    answers = dict(gather(local))
    return task_result(examples, "generation", [answers[index] for index in range(len(examples))])


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
