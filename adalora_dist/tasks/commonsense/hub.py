"""The eight commonsense data sets on the Hugging Face Hub, as rows of instruction, input, output and answer.

Only data sets without loading scripts are used (``datasets`` 5 refuses scripts). The functions that map one raw row
are pure; each names the columns of its data set. Evaluation uses the split whose labels are public.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.bad_rows import Rows
from adalora_dist.tasks.rows.hub import HubData

Row = dict[str, str]


def boolq(raw: Mapping[str, Any]) -> Row:
    """google/boolq: question, answer (bool), passage. The passage is left out: the question is asked closed-book."""
    if not isinstance(raw["answer"], bool):
        raise ValueError(f"answer is {raw['answer']!r}, not true or false")
    question = raw["question"].strip()
    question += "" if question.endswith("?") else "?"
    return _row(
        f"Please answer the following question with true or false, question: {question}",
        choices=("true", "false"),
        answer="true" if raw["answer"] else "false",
    )


def piqa(raw: Mapping[str, Any]) -> Row:
    """baber/piqa: goal, sol1, sol2, label (0 or 1; -1 where hidden)."""
    lead = f"Please choose the correct solution to the question: {raw['goal'].strip()}"
    return choice_row(lead, "solution", [raw["sol1"], raw["sol2"]], int(raw["label"]))


def siqa(raw: Mapping[str, Any]) -> Row:
    """lighteval/siqa: context, question, answerA, answerB, answerC, label ("1", "2" or "3")."""
    lead = f"Please choose the correct answer to the question: {raw['context'].strip()} {raw['question'].strip()}"
    return choice_row(lead, "answer", [raw["answerA"], raw["answerB"], raw["answerC"]], int(raw["label"]) - 1)


def hellaswag(raw: Mapping[str, Any]) -> Row:
    """Rowan/hellaswag: activity_label, ctx, endings (four), label ("0" to "3"; "" where hidden)."""
    lead = f"Please choose the correct ending of the text: {raw['activity_label'].strip()}: {raw['ctx'].strip()}"
    return choice_row(lead, "ending", raw["endings"], int(raw["label"]))


def winogrande(raw: Mapping[str, Any]) -> Row:
    """allenai/winogrande: sentence with one blank "_", option1, option2, answer ("1" or "2"; "" where hidden)."""
    lead = f"Please choose the correct option for the blank _ in the sentence: {raw['sentence'].strip()}"
    return choice_row(lead, "option", [raw["option1"], raw["option2"]], int(raw["answer"]) - 1)


def arc(raw: Mapping[str, Any]) -> Row:
    """allenai/ai2_arc: question, choices {text, label} (three to five), answerKey ("A" to "E" or "1" to "5")."""
    return _lettered(raw["question"], raw)


def openbookqa(raw: Mapping[str, Any]) -> Row:
    """allenai/openbookqa, main: question_stem, choices {text, label} (four), answerKey ("A" to "D")."""
    return _lettered(raw["question_stem"], raw)


@dataclass(frozen=True, kw_only=True)
class HubTask(HubData):
    """Where a task lives, its labelled evaluation split, and its row mapping."""

    evaluation_split: str
    to_row: Callable[[Mapping[str, Any]], Row]


HUB_TASKS = {
    "boolq": HubTask("google/boolq", evaluation_split="validation", to_row=boolq),
    "piqa": HubTask("baber/piqa", evaluation_split="validation", to_row=piqa),
    "siqa": HubTask("lighteval/siqa", evaluation_split="validation", to_row=siqa),
    "hellaswag": HubTask("Rowan/hellaswag", evaluation_split="validation", to_row=hellaswag),
    # xl is the largest training set (40,398 rows); all sizes share the validation set.
    "winogrande": HubTask("allenai/winogrande", "winogrande_xl", evaluation_split="validation", to_row=winogrande),
    "arc_easy": HubTask("allenai/ai2_arc", "ARC-Easy", evaluation_split="test", to_row=arc),
    "arc_challenge": HubTask("allenai/ai2_arc", "ARC-Challenge", evaluation_split="test", to_row=arc),
    "openbookqa": HubTask("allenai/openbookqa", "main", evaluation_split="test", to_row=openbookqa),
}


def hub_split(task: str, split: str) -> str:
    """What ``train`` or ``test`` is called on the Hub."""
    return HUB_TASKS[task].evaluation_split if split == "test" else split


def hub_rows(task: str, split: str) -> Rows:
    """Yield (origin, row) of one split, ``train`` or ``test``; origin is ``path/name/split:row``, row 1 first.

    For a row that has another form than its mapping expects, the error that says so is yielded in its place.

    Raises:
        UserError: the data set cannot be loaded.
    """
    hub_task = HUB_TASKS[task]
    instead = f"--data FOLDER with FOLDER/{task}/train.jsonl and FOLDER/{task}/test.jsonl"
    for origin, raw in hub_task.rows(hub_split(task, split), instead):
        try:
            yield origin, hub_task.to_row(cast(Mapping[str, Any], raw))
        except (KeyError, ValueError, AttributeError, TypeError, OverflowError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            hint = "the data set may have changed: use local files with --data FOLDER"
            yield origin, UserError(f"{origin}: the row cannot be used ({reason}); {hint}")


def _lettered(question: str, raw: Mapping[str, Any]) -> Row:
    labels = list(raw["choices"]["label"])
    lead = f"Please choose the correct answer to the question: {question.strip()}"
    return choice_row(lead, "answer", raw["choices"]["text"], labels.index(raw["answerKey"]))


def choice_row(lead: str, word: str, texts: Sequence[str], correct: int) -> Row:
    """The row that asks for one of ``texts``, which are called ``word1``, ``word2``, ...; ``correct`` counts from 0.

    Raises:
        ValueError: there is no such choice.
    """
    if not 0 <= correct < len(texts):
        raise ValueError(f"label {correct} of {len(texts)} choices")
    choices = [f"{word}{number}" for number in range(1, len(texts) + 1)]
    listed = " ".join(f"{choice.capitalize()}: {text.strip()}" for choice, text in zip(choices, texts, strict=True))
    return _row(f"{lead}\n\n{listed}", choices, choices[correct])


def _row(text: str, choices: Sequence[str], answer: str) -> Row:
    return {
        "instruction": f"{text}\n\nAnswer format: {'/'.join(choices)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
