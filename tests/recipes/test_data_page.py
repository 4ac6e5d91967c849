"""docs/data.md: its rows are read as it says, its commands are parsed, and one of them runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from adalora_dist.config.flags import parse_config
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.tasks.e2e.config import E2EConfig
from adalora_dist.tasks.glue.config import GlueConfig
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.sft.config import SftConfig, SftDataConfig
from adalora_dist.tasks.sft.forms import FORMS
from adalora_dist.tasks.sft.rows import load_tables
from adalora_dist.tasks.squad.config import SquadConfig
from adalora_dist.tasks.summarization.config import SummarizationConfig
from tests.support.paths import ROOT
from tests.support.ranks import import_package
from tests.support.recipe_runs import losses_of, run_recipe
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama

import_package()

CONFIGS: dict[str, Any] = {
    "llama_sft": SftConfig,
    "llama_commonsense": CommonsenseConfig,
    "deberta_glue": GlueConfig,
    "deberta_squad": SquadConfig,
    "summarize_bart": SummarizationConfig,
    "gpt2_e2e": E2EConfig,
}
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = re.findall(r"```json\n(.*?)\n```", PAGE, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "cache"))


def test_every_form_has_a_row_that_is_read_as_it(tmp_path: Path) -> None:
    assert len(ROWS) == len(FORMS)
    for row, form in zip(ROWS, FORMS, strict=True):
        path, said = tmp_path / f"{form.required[0]}.jsonl", []
        path.write_text(row + "\n", encoding="utf-8")
        load_tables(SftDataConfig(source=(str(path),)), BadRows("error"), said.append)
        assert said == [f"{path}: {form.name}; 1 rows"]


def test_commands_are_those_of_the_recipes() -> None:
    of_recipe = dict.fromkeys(CONFIGS, 0)
    for command in COMMANDS:
        words = shlex.split(command)
        start, name = next((k, name) for k, word in enumerate(words) for name in CONFIGS if name in word)
        assert (ROOT / words[start]).is_file()
        parse_config(CONFIGS[name], words[start + 1 :])
        of_recipe[name] += 1
    assert of_recipe["llama_sft"] >= 6 and all(of_recipe.values())


def test_a_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that maps columns, on a table of the user's, with a tiny model in the place of the named one."""
    [command] = [line for line in COMMANDS if "qa.csv" in line]
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "FOLDER_OR_HUB_ID")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "FOLDER_OR_HUB_ID")
    rows = "".join(f'"What is {n}, please?",It is {n}.\r\n' for n in range(12))
    (tmp_path / "qa.csv").write_text("question,answer\r\n" + rows)
    monkeypatch.chdir(tmp_path)
    words = [*shlex.split(command)[3:], "--max-steps", "3", "--batch-size", "4", "--max-new-tokens", "4"]
    code, output, errors = run_recipe("llama_sft", 1, words)
    assert code == 0, errors
    assert "(instruction=question, output=answer); 12 rows" in output and len(losses_of(tmp_path / "runs/latest")) == 3
