"""Exact match and F1 of SQuAD v1.1 and v2.0, as their official scorers define them.

Texts are compared in lower case, without punctuation and English articles, words separated by one space. F1 is that of
the multisets of words; of several right answers the best counts. In v2.0 a question without answer is right exactly if
nothing is answered, and right answers that normalise to nothing do not count as such.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, then punctuation out, then articles out, then single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(answer: str, right: str) -> float:
    """1 if both are the same after :func:`normalise`, else 0."""
    return float(normalise(answer) == normalise(right))


def f1(answer: str, right: str, both_empty: float) -> float:
    """Harmonic mean of the shares of common words; ``both_empty`` if neither has a word (v1.1: 0, v2.0: 1)."""
    found, expected = normalise(answer).split(), normalise(right).split()
    if not found and not expected:
        return both_empty
    num_same = sum((Counter(found) & Counter(expected)).values())
    return 2 * num_same / (len(found) + len(expected))


def squad_scores(task: str, answers: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over all questions in percent: ``exact`` and ``f1``; for v2.0 also of those with and without an answer.

    Args:
        task: v1.1 or v2.0.
        answers: what was answered; "" for no answer.
        right: of each question all right answers; empty: it has none.
    """
    exact, overlap = zip(*(_of_question(task, a, r) for a, r in zip(answers, right, strict=True)), strict=True)
    scores = {"exact": _percent(exact), "f1": _percent(overlap)}
    if task == "v2.0":
        has_answer = [bool(_usable(r)) for r in right]
        for name, wanted in (("answerable", True), ("unanswerable", False)):
            chosen = [k for k, has in enumerate(has_answer) if has == wanted]
            if chosen:
                scores[f"{name} exact"] = _percent([exact[k] for k in chosen])
                scores[f"{name} f1"] = _percent([overlap[k] for k in chosen])
    return scores


def best_thresholds(
    answers: Sequence[str], null_scores: Sequence[float], right: Sequence[Sequence[str]]
) -> dict[str, float]:
    """v2.0: the highest ``exact`` and ``f1`` that any threshold on the null score reaches, and those thresholds.

    Args:
        answers: the best answer to each question, whatever its null score.
    """
    order = sorted(range(len(answers)), key=lambda k: null_scores[k])
    result: dict[str, float] = {}
    for column, name in enumerate(("exact", "f1")):
        # Nothing answered; then question by question, those first that are most likely to have an answer.
        total = best = float(sum(not _usable(r) for r in right))
        threshold = min(null_scores) - 1
        for position, k in enumerate(order):
            answered = _of_question("v2.0", answers[k], right[k])[column]
            total += answered - (not _usable(right[k]))
            is_last_of_equals = position + 1 == len(order) or null_scores[order[position + 1]] > null_scores[k]
            if total > best and is_last_of_equals:
                best, threshold = total, null_scores[k]
        result |= {f"best {name}": 100 * best / len(answers), f"best {name} threshold": threshold}
    return result


def _of_question(task: str, answer: str, right: Sequence[str]) -> tuple[float, float]:
    both_empty = 1.0 if task == "v2.0" else 0.0
    choices = _usable(right) or [""] if task == "v2.0" else right
    return max(exact_match(answer, r) for r in choices), max(f1(answer, r, both_empty) for r in choices)


def _usable(right: Sequence[str]) -> list[str]:
    return [text for text in right if normalise(text)]


def _percent(values: Sequence[float]) -> float:
    return 100 * math.fsum(values) / len(values)
