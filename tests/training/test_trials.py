"""Refused before the first evaluation and the first step, whatever the model is: in one line, by a whole recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import import_deepspeed, import_package
from tests.support.recipe_runs import ENGINES, run_recipe
from tests.support.summarization_runs import arguments

import_deepspeed()
import_package()


def refused(summaries: Path, output: Path, words: str, engine: str) -> tuple[str, str]:
    """(standard output, standard error) of a run that made nothing of its folder."""
    count, environment = (2, ENGINES[engine]) if engine != "single" else (1, {})
    code, said, errors = run_recipe("summarize_bart", count, arguments(summaries, output, *words.split()), environment)
    assert code == 2 and "Traceback" not in errors, errors
    assert not (output / "run.json").exists()
    return said, errors


@pytest.mark.parametrize("engine", ["single", pytest.param("fsdp2", marks=pytest.mark.slow), "zero3"])
def test_chunks_of_logits_that_are_changed_behind_the_head(summaries: Path, tmp_path: Path, engine: str) -> None:
    """BART adds a bias to them."""
    _, errors = refused(summaries, tmp_path / "run", "--logits-chunk 5", engine)
    assert "logits_chunk=5: BartForConditionalGeneration does something to its logits behind its head" in errors


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_weights_that_no_process_has_are_not_merged(summaries: Path, tmp_path: Path, engine: str) -> None:
    """Before rows and model are read."""
    said, errors = refused(summaries, tmp_path / "run", "--merge-to-generate", engine)
    assert f"merge_to_generate true under {engine}: a process has only its share" in errors
    assert "training rows" not in said


SELECTIVE = "--gradient-checkpointing --checkpoint-activations selective"


@pytest.mark.parametrize("more", [pytest.param("", marks=pytest.mark.slow), " --quantization nf4"])
def test_selective_recomputation_under_zero3(summaries: Path, tmp_path: Path, more: str) -> None:
    """Quantised weights, too, which DeepSpeed takes over after blocks have been told what to keep."""
    said, errors = refused(summaries, tmp_path / "run", SELECTIVE + more, "zero3")
    assert "checkpoint_activations selective under ZeRO-3" in errors and "training rows" not in said


@pytest.mark.parametrize("words", ["--merge-to-generate", SELECTIVE])
def test_a_dry_run_refuses_it_as_the_run_does(summaries: Path, tmp_path: Path, words: str) -> None:
    refused(summaries, tmp_path / "run", f"{words} --dry-run", "zero3")
