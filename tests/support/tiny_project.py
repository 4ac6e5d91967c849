"""A model folder and a data folder small enough to be written, trained on and evaluated inside a test."""

from __future__ import annotations

import json
from pathlib import Path

from adalora_dist.tasks.commonsense.config import CommonsenseDataConfig
from adalora_dist.tasks.commonsense.prompts import prompt_text
from adalora_dist.tasks.commonsense.rows import load_tasks
from tests.support.paths import ROOT
from tests.support.settings import adapter_flags
from tests.support.tiny_language_model import tiny_llama, word_tokenizer

RECIPE = ROOT / "recipes" / "llama_commonsense.py"
STEPS = 20
MATRICES, INIT_RANK, TARGET_RANK = 14, 3, 2
FLAGS = [
    *("--max-steps", str(STEPS), "--batch-size", "8", "--micro-batch-size", "4", "--learning-rate", "1e-2"),
    *("--max-eval-rows", "5", "--log-every", "6"),
]

_THINGS = ("dog", "cat", "fish", "bird", "stone", "river", "cloud", "lamp", "chair", "spoon")
_QUALITIES = ("alive", "heavy", "wet")
_ALIVE = set(_THINGS[:4])


def write_data(folder: Path) -> None:
    """Two tasks, boolq (20 rows to train on, 10 to test) and openbookqa (10 and 7), with answers that can be learnt."""
    pairs = [(thing, quality) for quality in _QUALITIES for thing in _THINGS]
    boolq = []
    for thing, quality in pairs:
        answer = "true" if thing in _ALIVE else "false"
        boolq.append(_row(f"Please answer with true or false, question: is the {thing} {quality}?", answer))
    openbookqa = []
    for index, thing in enumerate(_THINGS):
        for shift in (1, 3):
            others = [_THINGS[(index + shift * k) % len(_THINGS)] for k in range(4)]
            others = others[-(index % 4) :] + others[: -(index % 4)] if index % 4 else others
            options = " ".join(f"Answer{k + 1}: {other}" for k, other in enumerate(others))
            answer = f"answer{others.index(thing) + 1}"
            form = "Answer format: answer1/answer2/answer3/answer4"
            openbookqa.append(_row(f"Which one is a {thing}?\n\n{options}\n\n{form}", answer))
    for task, rows, num_train in (("boolq", boolq, 20), ("openbookqa", openbookqa[:17], 10)):
        (folder / task).mkdir(parents=True)
        for split, part in (("train", rows[:num_train]), ("test", rows[num_train:])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")


def _row(instruction: str, answer: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def write_model(folder: Path, data: Path) -> None:
    """A LLaMA of two layers that knows the words of ``data``, and its tokenizer, as save_pretrained writes them."""
    train, test = load_tasks(CommonsenseDataConfig(source=str(data)))
    examples = [*train, *(example for rows in test.values() for example in rows)]
    tokenizer = word_tokenizer([text for e in examples for text in (prompt_text(e), e.output)])
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)


class Project:
    """A folder with a tiny model and tiny data."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.model = path, path / "data", path / "model"
        write_data(self.data)
        write_model(self.model, self.data)

    def arguments(self, output_dir: Path, *more: str) -> list[str]:
        where = ["--model", str(self.model), "--data", str(self.data), "--output-dir", str(output_dir)]
        return [*where, *FLAGS, *adapter_flags(more, init_rank=INIT_RANK, target_rank=TARGET_RANK), *more]
