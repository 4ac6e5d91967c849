"""What the shell offers at the end of a line, and that it asks this program for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adalora_dist.__main__ import main
from adalora_dist.training.completion import candidates
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT

OFFERED = {
    "adalora-dist ": ["ls", "run"],
    "adalora-dist r": ["run"],
    "adalora-dist run llama_s": ["llama_sft"],
    "adalora-dist cp zero1": ["zero1"],
    "adalora-dist run llama_sft --engine f": ["fsdp2"],
    "adalora-dist run llama_sft --method lora": ["lora", "lora_fa"],
    "adalora-dist run llama_sft --init-r": ["--init-rank"],
    "adalora-dist run llama_sft --seed 3 --no-overw": ["--no-overwrite"],
    "adalora-dist run llama_sft --config llama_sft_d": ["llama_sft_demo"],
    "adalora-dist run llama_sft --eng": ["--engine"],
    "adalora-dist run nothing --eng": ["--engine"],
    "adalora-dist inspect r": [],
    "adalora-dist run 'llama_sf": [],
}


@pytest.mark.parametrize("line", OFFERED)
def test_what_can_stand_next(line: str) -> None:
    assert candidates(line, ["ls", "run"], ["--engine", "-n"]) == OFFERED[line]


@pytest.mark.parametrize("content", ["def (", "import no_such_module", "raise SystemExit(3)"])
def test_a_recipe_that_cannot_be_read_offers_what_run_has(tmp_path: Path, content: str) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(content)
    assert candidates(f"adalora-dist run {recipe} --eng", ["run"], ["--engine", "-n"]) == ["--engine"]


def test_the_shell_asks_with_what_stands_before_the_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "adalora-dist ins --typo")
    monkeypatch.setenv("COMP_POINT", "16")
    main(["complete", "adalora-dist", "ins", "adalora-dist"])  # bash appends words, which may look like flags
    assert capsys.readouterr().out == "inspect\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_for_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", shell])
    assert "adalora-dist complete" in capsys.readouterr().out


def test_bash_offers_it(tmp_path: Path) -> None:
    if not (bash := shutil.which("bash")):
        pytest.skip("no bash")
    (tmp_path / "adalora-dist").write_text(f'#!/bin/sh\nexec {sys.executable} -m adalora_dist "$@"\n')
    (tmp_path / "adalora-dist").chmod(0o755)
    script = (
        'eval "$(adalora-dist completion bash)"; COMP_LINE="adalora-dist rep"; COMP_POINT=16; '
        "export COMP_LINE COMP_POINT; adalora-dist complete adalora-dist rep adalora-dist; complete -p adalora-dist"
    )
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([bash, "-c", script], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.stdout.splitlines()[0] == "report" and "adalora-dist complete" in done.stdout.splitlines()[1]
