"""The metrics of the GLUE tasks, by scikit-learn and SciPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import numpy as np

from adalora_dist.io.errors import UserError


def classification_metrics(
    names: Sequence[str], predictions: Sequence[float], labels: Sequence[float]
) -> dict[str, float]:
    """Matthews correlation, accuracy, F1 of class 1 and mean F1 of all classes, Pearson and Spearman correlation, root
    mean squared error: those that are named.

    Between -1 or 0 and 1, but for the last, which is in the labels' own units. A correlation with a constant is not
    defined; it counts as 0, as Matthews' does.

    Args:
        predictions: class numbers, or numbers for the last three.

    Raises:
        UserError: scikit-learn or SciPy is not installed.
    """
    require_metrics()
    from scipy import stats
    from sklearn import metrics

    x, y = np.asarray(labels), np.asarray(predictions)
    is_constant = len(set(labels)) < 2 or len(set(predictions)) < 2
    compute: dict[str, Callable[[], float]] = {
        "matthews": lambda: metrics.matthews_corrcoef(x, y),
        "accuracy": lambda: metrics.accuracy_score(x, y),
        "f1": lambda: metrics.f1_score(x, y, zero_division=0.0),
        "macro_f1": lambda: metrics.f1_score(x, y, average="macro", zero_division=0.0),
        "rmse": lambda: float(np.sqrt(np.mean((x - y) ** 2))),
        "pearson": lambda: 0.0 if is_constant else stats.pearsonr(x, y).statistic,
        "spearman": lambda: 0.0 if is_constant else stats.spearmanr(x, y).statistic,
    }
    return {name: float(compute[name]()) for name in names}


def require_metrics() -> None:
    """Raise before any work if scikit-learn or SciPy is missing."""
    if find_spec("sklearn") is None or find_spec("scipy") is None:
        raise UserError("the metrics need scikit-learn and scipy: pip install 'adalora-dist[eval]'")


def mean_and_deviation(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Over repetitions: mean, and the sample standard deviation (0 for a single run), of every metric."""
    summary = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[name] = {"mean": math.fsum(values) / len(values), "deviation": deviation}
    return summary
