"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of generated texts that have several references each.

All by kept libraries. Published E2E figures come from the challenge's own script, which tokenises in its own way, so
compare runs of this file with each other:

- BLEU: sacrebleu, 0 to 100. NIST: nltk, 5-grams, on sacrebleu's tokens. ROUGE-L: rouge-score with stemming, F1 against
  the best reference, 0 to 100.
- CIDEr: pycocoevalcap, 0 to 10, on sacrebleu's tokens in lower case.
- METEOR: version 1.5, the Java program that comes with pycocoevalcap, 0 to 100. nltk's needs WordNet, which pip cannot
  install.

pycocoevalcap (104 MB) is optional; what cannot be had is named with the reason, and never left out without a word.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Sequence
from typing import Any

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.evaluation.rouge import rouge_scorer

METRICS = ("bleu", "nist", "meteor", "rougeL", "cider")


def missing_metrics() -> dict[str, str]:
    """The metrics that cannot be had here, and why.

    Raises:
        UserError: one of the libraries that are no option is missing.
    """
    rouge_scorer()
    for package in ("sacrebleu", "nltk"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'adalora-dist[eval]'")
    if importlib.util.find_spec("pycocoevalcap") is None:
        why = "needs pycocoevalcap: pip install 'adalora-dist[captions]'"
        return {"meteor": f"{why}, and Java", "cider": why}
    return {} if shutil.which("java") else {"meteor": "needs the program java"}


def data_to_text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Every metric that can be had, by name."""
    import sacrebleu
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.metrics.bleu import BLEU

    texts = [text.strip() or "." for text in texts]  # an empty text has no precision
    tokenize = BLEU().tokenizer
    words = [tokenize(text).split() for text in texts]
    reference_words = [[tokenize(reference).split() for reference in of_text] for of_text in references]
    scorer = rouge_scorer(["rougeL"])
    rouge = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in of_text)
        for text, of_text in zip(texts, references, strict=True)
    ]
    most = max(len(of_text) for of_text in references)
    streams: Any = [[of_text[i] if i < len(of_text) else None for of_text in references] for i in range(most)]
    longest = min(5, max(len(of_text) for of_text in words))  # nltk divides by the number of n-grams
    scores = {
        "bleu": sacrebleu.corpus_bleu(texts, streams).score,
        "nist": corpus_nist(reference_words, words, n=longest),
        "rougeL": 100 * math.fsum(rouge) / len(rouge),
    }
    missing = missing_metrics()
    if "cider" not in missing:
        scores["cider"] = _coco("cider.cider", "Cider", words, reference_words)
    if "meteor" not in missing:
        scores["meteor"] = 100 * _coco("meteor.meteor", "Meteor", words, reference_words)
    return {name: scores[name] for name in METRICS if name in scores}


def _coco(module: str, name: str, words: list[list[str]], references: list[list[list[str]]]) -> float:
    metric: Any = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)()
    given = {i: [" ".join(words_of).lower()] for i, words_of in enumerate(words)}
    wanted = {i: [" ".join(reference).lower() for reference in of_text] for i, of_text in enumerate(references)}
    return float(metric.compute_score(wanted, given)[0])
