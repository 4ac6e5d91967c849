"""Accuracy by likelihood: the choice whose reply the model finds most probable.

The score of a choice is the sum of log p over the tokens of the reply that gives it ('the correct answer is answer2'),
given the prompt. It is not divided by length: the replies of one question differ in the name of the choice only. EOS
is not scored, so that an untrained backbone is judged by its answer and not by where it stops. The first of equal
scores wins.

Choices whose replies differ in the last token alone (answer1, answer2) share one sequence, without that token: the
model says at its end how likely each is.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from adalora_dist.tasks.batches import collate
from adalora_dist.tasks.commonsense.prompts import choice_tokens, prompts_of
from adalora_dist.tasks.commonsense.results import TaskResult, task_result
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.evaluation.batches import Gather, dealt_batches, evaluating, gather_lists
from adalora_dist.tasks.padding import without_mask
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
        batch_size: sequences in one forward of one rank: an example with all choices that differ in their last token.
        max_length: as in training; see ``prompt_tokens``.

    Raises:
        UserError: a reply does not fit, or two choices of an example have the same tokens.
    """
    prompts = prompts_of(examples, tokenizer, max_length, show_progress=False)
    heads = [_heads(choice_tokens(example, tokenizer)) for example in examples]
    requests = [(index, head) for index, of_example in enumerate(heads) for head in of_example]
    # Longest first: what does not fit into memory fails at once.
    requests.sort(key=lambda request: -len(prompts[request[0]]) - len(request[1]))
    padding = padding_token(tokenizer)
    local: list[tuple[int, int, float]] = []
    with evaluating(model) as device:
        for batch, counts in dealt_batches(requests, batch_size, rank, world_size, f"{examples[0].task} likelihood"):
            lasts = [[token for _, token in heads[index][head]] for index, head in batch]
            asked = [prompts[index] for index, _ in batch]
            totals = shared_log_likelihoods(model, asked, [head for _, head in batch], lasts, padding, device)
            if counts:
                for (index, head), of_head in zip(batch, totals, strict=True):
                    choices = (choice for choice, _ in heads[index][head])
                    local += [(index, choice, total) for choice, total in zip(choices, of_head, strict=True)]
    scores = {(index, choice): total for index, choice, total in gather(local)}
    answers = []
    for index, example in enumerate(examples):
        totals = [scores[index, choice] for choice in range(len(example.choices))]
        answers.append(example.choices[totals.index(max(totals))])
    return task_result(examples, "likelihood", answers)


def _heads(replies: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """Replies without their last tokens, each with (choice, last token) of the replies that begin with it."""
    heads: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for choice, reply in enumerate(replies):
        heads.setdefault(tuple(reply[:-1]), []).append((choice, reply[-1]))
    return heads


def shared_log_likelihoods(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    heads: Sequence[Sequence[int]],
    lasts: Sequence[Sequence[int]],
    padding: int,
    device: torch.device,
) -> list[list[float]]:
    """Of each prompt and head, per last token: the sum of log p over head and last token.

    A model reads prompt and head, and at its end says how likely each last token is: one sequence for all replies that
    differ in nothing else.
    """
    rows: list[EncodedRow] = [
        {"input_ids": [*prompt, *head], "labels": [IGNORED] * len(prompt) + [*head]}
        for prompt, head in zip(prompts, heads, strict=True)
    ]
    batch = collate(rows, padding)
    targets = batch.pop("labels")
    # Position t predicts token t + 1; logits of the prompts would be most of the memory and are not needed.
    first = min(len(prompt) for prompt in prompts) - 1
    inputs = {name: tensor.to(device) for name, tensor in without_mask(model, batch).items()}
    if "logits_to_keep" in inspect.signature(getattr(model, "module", model).forward).parameters:
        logits = model(**inputs, logits_to_keep=targets.shape[1] - first).logits
    else:
        logits = model(**inputs).logits[:, first:]
    # Of a row the positions from its prompt's last token on: each token of the head, and the last one, is predicted.
    pairs = enumerate(zip(prompts, rows, strict=True))
    where = [(k, len(prompt) - 1 - first, len(row["input_ids"]) - first) for k, (prompt, row) in pairs]
    ends = torch.tensor([[k, stop - 1] for k, _, stop in where], device=device)
    at_end = logits[ends[:, 0], ends[:, 1]].float().log_softmax(-1)
    within = [
        (k, place, rows[k]["input_ids"][first + place + 1])
        for k, start, stop in where
        for place in range(start, stop - 1)
    ]
    of_heads = torch.zeros(len(rows), device=device)
    if within:
        k, place, token = torch.tensor(within, device=device).unbind(1)
        log_p = logits[k, place].float().log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        of_heads = of_heads.index_add(0, k, log_p)
    counts = [len(tokens) for tokens in lasts]
    rows_of = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)], device=device)
    last = torch.tensor([token for tokens in lasts for token in tokens], device=device)
    totals = (of_heads[rows_of] + at_end[rows_of, last]).tolist()
    found = iter(totals)
    return [list(islice(found, count)) for count in counts]


def reply_log_likelihoods(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    padding: int,
    device: torch.device,
) -> torch.Tensor:
    """Sum of log p(reply token | prompt and the reply tokens before it), for each pair: float32 [pairs]."""
    heads, lasts = [reply[:-1] for reply in replies], [[reply[-1]] for reply in replies]
    totals = shared_log_likelihoods(model, prompts, heads, lasts, padding, device)
    return torch.tensor([total for [total] in totals], device=device)
