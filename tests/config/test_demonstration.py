"""Which command lines get a recipe's demonstration."""

from __future__ import annotations

from pathlib import Path

import pytest

from adalora_dist.config.demonstration import or_demonstration

FILE = Path("demo.yaml")


@pytest.mark.parametrize("words", [[], ["--max-steps", "3"], ["--method=lora", "--output-dir", "model"]])
def test_a_command_line_that_names_no_work_gets_it(words: list[str]) -> None:
    assert or_demonstration(words, FILE) == ["--config", "demo.yaml", *words]


@pytest.mark.parametrize("flag", ["--config", "--preset", "--model", "--data"])
def test_one_that_names_some_is_left_alone(flag: str) -> None:
    for words in ([flag, "x"], ["--max-steps", "3", f"{flag}=x"]):
        assert or_demonstration(words, FILE) == words
