"""The scores of GLUE and SQuAD against those of the ``evaluate`` package, which reads its definitions from the Hub.

``evaluate.load`` looks for a folder of the given name before it asks the Hub: without a network, run this in the folder
``metrics`` of the package's repository.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adalora_dist.tasks.glue.metrics import classification_metrics
from adalora_dist.tasks.glue.rows import TASKS
from adalora_dist.tasks.squad.metrics import squad_scores
from tests.support.scored_answers import STORED

pytestmark = pytest.mark.download

THEIR_NAMES = {"matthews": "matthews_correlation", "spearman": "spearmanr"}


@pytest.mark.parametrize("name", TASKS)
def test_glue(name: str) -> None:
    import evaluate

    task, draw = TASKS[name], np.random.default_rng(0)
    theirs = evaluate.load("glue", name)
    for num_rows in (12, 300):
        if task.num_labels == 1:
            labels = draw.integers(0, 26, num_rows) / 5  # with ties, as STS-B has them
            predictions = np.float32(labels + draw.normal(size=num_rows)).astype(float)
        else:
            labels = draw.integers(0, task.num_labels, num_rows)
            guesses = draw.integers(0, task.num_labels, num_rows)
            predictions = np.where(draw.random(num_rows) < 0.6, labels, guesses)
        found = classification_metrics(task.metrics, predictions.tolist(), labels.tolist())
        expected = theirs.compute(predictions=predictions.tolist(), references=labels.tolist())
        assert {THEIR_NAMES.get(metric, metric): value for metric, value in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize(("task", "name", "column"), [("v1.1", "squad", 2), ("v2.0", "squad_v2", 3)])
def test_squad(task: str, name: str, column: int) -> None:
    import evaluate

    cases = [case for case in STORED if case[column] is not None]
    predictions: list[dict[str, Any]] = [{"id": str(k), "prediction_text": case[0]} for k, case in enumerate(cases)]
    if task == "v2.0":
        predictions = [{**row, "no_answer_probability": 0.0} for row in predictions]
    references = [
        {"id": str(k), "answers": {"text": case[1], "answer_start": [0] * len(case[1])}} for k, case in enumerate(cases)
    ]
    theirs = evaluate.load(name).compute(predictions=predictions, references=references)
    found = squad_scores(task, [case[0] for case in cases], [case[1] for case in cases])
    expected = {"exact": theirs["exact_match" if task == "v1.1" else "exact"], "f1": theirs["f1"]}
    if task == "v2.0":
        expected |= {
            f"{ours} {metric}": theirs[f"{prefix}_{metric}"]
            for ours, prefix in (("answerable", "HasAns"), ("unanswerable", "NoAns"))
            for metric in ("exact", "f1")
        }
    assert found == pytest.approx(expected)
