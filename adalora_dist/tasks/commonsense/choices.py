"""Accuracy by likelihood: the choice whose reply the model finds most probable.

The score of a choice is the sum of log p over the tokens of the reply that gives it ('the correct answer is answer2'),
given the prompt. It is not divided by length: the replies of one question differ in the name of the choice only. EOS
is not scored, so that an untrained backbone is judged by its answer and not by where it stops. The first of equal
scores wins.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from adalora_dist.tasks.batches import collate
from adalora_dist.tasks.commonsense.prompts import choice_tokens, prompt_text, prompt_tokens
from adalora_dist.tasks.commonsense.results import TaskResult, task_result
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.evaluation.batches import Gather, dealt_batches, evaluating, gather_lists
from adalora_dist.tasks.rows.tokens import IGNORED, EncodedRow, padding_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    max_length: int,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = gather_lists,
) -> TaskResult:
    """Score every choice of every example (all of one task) with a causal language model.

    Every rank must call it with the same examples, runs the same number of forwards, and returns the same result,
    which does not depend on ``world_size``.

    Args:
        batch_size: sequences (example and choice) in one forward of one rank.
        max_length: as in training; see ``prompt_tokens``.

    Raises:
        UserError: a reply does not fit, or two choices of an example have the same tokens.
    """
    # Longest first: what does not fit into memory fails at once. Characters will do for sorting, and save every rank
    # from tokenising the prompts of the others.
    order = sorted(range(len(examples)), key=lambda index: -len(prompt_text(examples[index])))
    requests = [(index, choice) for index in order for choice in range(len(examples[index].choices))]
    local: list[tuple[int, int, float]] = []
    with evaluating(model) as device:
        for batch, counts in dealt_batches(requests, batch_size, rank, world_size, f"{examples[0].task} likelihood"):
            prompts = [prompt_tokens(examples[index], tokenizer, max_length) for index, _ in batch]
            replies = [choice_tokens(examples[index], tokenizer)[choice] for index, choice in batch]
            sums = reply_log_likelihoods(model, prompts, replies, padding_token(tokenizer), device).tolist()
            if counts:
                local += [(index, choice, total) for (index, choice), total in zip(batch, sums, strict=True)]
    scores = {(index, choice): total for index, choice, total in gather(local)}
    answers = []
    for index, example in enumerate(examples):
        totals = [scores[index, choice] for choice in range(len(example.choices))]
        answers.append(example.choices[totals.index(max(totals))])
    return task_result(examples, "likelihood", answers)


def reply_log_likelihoods(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    padding: int,
    device: torch.device,
) -> torch.Tensor:
    """Sum of log p(reply token | prompt and the reply tokens before it), for each pair: float32 [pairs]."""
    rows: list[EncodedRow] = [
        {"input_ids": [*prompt, *reply], "labels": [IGNORED] * len(prompt) + [*reply]}
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    batch = {name: tensor.to(device) for name, tensor in collate(rows, padding).items()}
    labels = batch.pop("labels")
    # Position t predicts token t + 1; logits of the prompts would be most of the memory and are not needed.
    first = min(len(prompt) for prompt in prompts) - 1
    if "logits_to_keep" in inspect.signature(getattr(model, "module", model).forward).parameters:
        logits = model(**batch, use_cache=False, logits_to_keep=labels.shape[1] - first).logits
    else:
        logits = model(**batch, use_cache=False).logits[:, first:]
    targets = labels[:, first + 1 :]
    is_target = targets != IGNORED
    log_p = logits[:, :-1][is_target].float().log_softmax(-1).gather(-1, targets[is_target].unsqueeze(-1)).squeeze(-1)
    return torch.zeros(targets.shape, device=device).masked_scatter(is_target, log_p).sum(-1)
