"""Answers to questions of several turns, in the form that MT-Bench's judge reads.

Questions are JSON lines ``{"question_id": ..., "turns": [TEXT, ...]}``, with whatever else; answers are JSON lines
``{"question_id", "answer_id", "model_id", "choices": [{"index": 0, "turns": [TEXT, ...]}], "tstamp"}``. Every turn sees
the questions and answers before it, through the chat template. Decoding is that of the run's settings, greedy by
default, for all categories alike (FastChat samples in some of them). No judge comes with this project.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adalora_dist.io.digest import digest_of
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.evaluation.texts import generate_texts
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.fields import object_row, refuse_odd_text, shown
from adalora_dist.tasks.rows.read import file_rows
from adalora_dist.tasks.rows.source import checked_rows
from adalora_dist.tasks.sft.config import SftEvaluationConfig
from adalora_dist.tasks.sft.template import ChatTemplate, set_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Asked(NamedTuple):
    """A question: its id, as it is in the file, and what is asked in each turn."""

    id: Any
    turns: tuple[str, ...]
    origin: str


def read_questions(file: str) -> list[Asked]:
    """The questions of a file; no file is named: none.

    Raises:
        UserError: it cannot be read, or a row has no id or no turns.
    """
    if not file:
        return []
    if not Path(file).is_file():
        raise UserError(f"answer={file}: no such file; give one with lines of question_id and turns, or leave it out")

    def parse(row: object, origin: str) -> Asked:
        row = object_row(row, origin, ("question_id", "turns"))
        turns = row.get("turns")
        if "question_id" not in row:
            raise UserError(f"{origin}: field question_id is missing; legal: a number or a text")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise UserError(f"{origin}: field turns is {shown(turns)}; legal: a list of texts")
        for turn in turns:
            refuse_odd_text(turn, "turns", origin)
        return Asked(row["question_id"], tuple(turns), origin)

    return checked_rows(file, file_rows(Path(file)), parse, BadRows("error"))


def last_prompts(questions: Sequence[Asked], tokenizer: PreTrainedTokenizerBase) -> dict[int, list[list[int]]]:
    """By number of turns the prompts of the last one, in which the answers before it are still empty.

    Raises:
        UserError: the chat template refuses a question.
    """
    prompts: dict[int, list[list[int]]] = {}
    if questions:
        template = _template(tokenizer)
        for question in questions:
            messages = _messages(question, [""] * (len(question.turns) - 1))
            prompts.setdefault(len(question.turns), []).append(template.asking(messages, question.origin))
    return prompts


def answer_questions(
    questions: Sequence[Asked],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SftEvaluationConfig,
    ranks: Mapping[str, Any],
    synced_gpus: bool,
    model_id: str,
    closing: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """A record of answers for each question, in their order. Collective; all processes return the same texts.

    Args:
        model_id: what the judge is to call the model.
        closing: tokens that end a reply besides EOS.

    Raises:
        UserError: the chat template refuses a question.
    """
    template = _template(tokenizer)
    decoding = settings.model_copy(update={"max_new_tokens": settings.answer_tokens})
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max((len(question.turns) for question in questions), default=0)):
        asked = [index for index, question in enumerate(questions) if turn < len(question.turns)]
        prompts = [template.asking(_messages(questions[k], answers[k]), questions[k].origin) for k in asked]
        replies = generate_texts(
            model, tokenizer, prompts, [len(prompt) for prompt in prompts], decoding, **ranks,
            synced_gpus=synced_gpus, description=f"answer, turn {turn + 1}", closing=closing,
        )  # fmt: skip
        for index, reply in zip(asked, replies, strict=True):
            answers[index].append(reply.strip())
    now = time.time()
    return [
        {
            "question_id": question.id,
            "answer_id": digest_of([json.dumps([question.id, model_id, turns]).encode()])[:22],
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": now,
        }
        for question, turns in zip(questions, answers, strict=True)
    ]


def _template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    if not tokenizer.chat_template:
        set_template(tokenizer, "")
    return ChatTemplate(tokenizer)


def _messages(question: Asked, answers: Sequence[str]) -> list[dict[str, str]]:
    """The conversation up to the turn that is to be answered. A template may refuse an empty answer: it is a blank."""
    messages: list[dict[str, str]] = []
    for asked, answer in zip(question.turns, [*answers, None], strict=False):
        messages.append({"role": "user", "content": asked})
        if answer is None:
            break
        messages.append({"role": "assistant", "content": answer or " "})
    return messages
