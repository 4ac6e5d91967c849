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
    "adalora-dist export run --": ["--to"],
    "adalora-dist export run ": [],
    "adalora-dist export run --to ": ["merged", "lora"],
    "adalora-dist plan llama_sft --gp": ["--gpus"],
    "adalora-dist plan llama_sft --init-r": ["--init-rank"],
    "adalora-dist completion z": ["zsh"],
    "adalora-dist run 'llama_sf": [],
}


@pytest.mark.parametrize("line", OFFERED)
def test_what_can_stand_next(line: str) -> None:
    typed = line.split()[1:2]
    commands = {"ls": {}, "run": {"--engine": (), "-n": ()}}
    others = {"export": {"--to": ("merged", "lora")}, "plan": {"--gpus": ()}}
    assert candidates(line, commands | {name: others[name] for name in typed if name in others}) == OFFERED[line]


@pytest.mark.parametrize("content", ["def (", "import no_such_module", "raise SystemExit(3)"])
def test_a_recipe_that_cannot_be_read_offers_what_run_has(tmp_path: Path, content: str) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(content)
    assert candidates(f"adalora-dist run {recipe} --eng", {"run": {"--engine": (), "-n": ()}}) == ["--engine"]


def test_the_shell_asks_with_what_stands_before_the_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "adalora-dist ins --typo")
    monkeypatch.setenv("COMP_POINT", "16")
    main(["complete", "adalora-dist", "ins", "adalora-dist"])  # bash appends words, which may look like flags
    assert capsys.readouterr().out == "inspect\n"
    monkeypatch.setenv("COMP_LINE", "adalora-dist ins")
    for nowhere in ("", "-1", "abc", "1e3", "9" * 5000):
        monkeypatch.setenv("COMP_POINT", nowhere)
        main(["complete", "adalora-dist", "ins", "adalora-dist"])
        assert capsys.readouterr().out == "inspect\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_for_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", shell])
    assert "adalora-dist complete" in capsys.readouterr().out


ASKED = {
    "bash": "export COMP_LINE='adalora-dist rep' COMP_POINT=16; adalora-dist complete adalora-dist rep adalora-dist; "
    "complete -p adalora-dist",
    "zsh": "COMP_LINE='adalora-dist rep' COMP_POINT=16 adalora-dist complete; print -r -- $_comps[adalora-dist]",
    "fish": "complete -C 'adalora-dist repo'; complete -c adalora-dist",
}
"""By shell: what offers a word, and then says what has been registered."""


@pytest.mark.parametrize("name", ASKED)
def test_a_shell_offers_it(name: str, tmp_path: Path) -> None:
    """With nothing of its own set up before."""
    if not (shell := shutil.which(name)):
        pytest.skip(f"no {name} here: apt-get install {name}")
    (tmp_path / "adalora-dist").write_text(f'#!/bin/sh\nexec {sys.executable} -m adalora_dist "$@"\n')
    (tmp_path / "adalora-dist").chmod(0o755)
    evaluated = (
        "adalora-dist completion fish | source" if name == "fish" else f'eval "$(adalora-dist completion {name})"'
    )
    options = {"bash": [], "zsh": ["-f"], "fish": ["--no-config"]}[name]
    command = [shell, *options, "-c", f"{evaluated}; {ASKED[name]}"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.stdout.splitlines()[0] == "report", done.stderr
    assert "adalora-dist" in done.stdout.splitlines()[1] and "complete" in done.stdout.splitlines()[1]
