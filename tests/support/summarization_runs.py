"""How tests run the summarisation recipe on the tiny project."""

from __future__ import annotations

from pathlib import Path

from tests.support.settings import adapter_flags

STEPS, MATRICES = 12, 32
FLAGS = [
    *("--max-steps", str(STEPS), "--batch-size", "6", "--micro-batch-size", "3", "--learning-rate", "2e-2"),
    *("--num-beams", "2", "--max-new-tokens", "10", "--eval-batch-size", "2"),
    *("--max-source-length", "64", "--max-target-length", "16", "--log-every", "6"),
]
ADAPTER = {"init_rank": 3, "target_rank": 2}


def arguments(project: Path, output: Path, *more: str) -> list[str]:
    where = ["--model", str(project / "model"), "--data", str(project / "data"), "--output-dir", str(output)]
    return [*where, *FLAGS, *adapter_flags(more, **ADAPTER), *more]
