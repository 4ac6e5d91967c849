"""What a wheel carries beside the code, by which names it is found, listed and copied."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from adalora_dist.__main__ import main
from adalora_dist.io import shipped
from adalora_dist.training.shelf import about, copy, listing
from tests.support.paths import ROOT
from tests.support.refusals import refusal


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    """The names of setup.py, which has not set anything up."""
    import setuptools

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setuptools, "setup", lambda **words: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def test_a_wheel_has_every_file_of_a_clone(build: dict[str, Any]) -> None:
    tracked = subprocess.run(["git", "ls-files", *build["SHIPPED"]], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a clone")
    assert set(tracked.stdout.split()) <= {path.as_posix() for path in build["shipped"]()}
    assert len(tracked.stdout.split()) > 40
    assert {path.parts[0] for path in build["shipped"]()} == {"recipes", "launch", "ds_configs"}


def test_what_is_built_and_what_is_installed_from_a_clone(build: dict[str, Any], tmp_path: Path) -> None:
    from setuptools import Distribution

    command = build["BuildWithShipped"](Distribution({"packages": []}))
    command.ensure_finalized()
    command.build_lib = str(tmp_path)
    command.run()
    assert (tmp_path / "adalora_dist/_shipped/recipes/llama_sft.py").read_bytes() == (
        ROOT / "recipes/llama_sft.py"
    ).read_bytes()
    assert (tmp_path / "adalora_dist/_shipped/launch/slurm.sh").stat().st_mode & 0o100
    assert str(tmp_path / "adalora_dist/_shipped/ds_configs/zero2.json") in command.get_outputs()
    assert "launch/accelerate/fsdp2.yaml" in command.get_source_files()
    command.editable_mode = True
    assert command.get_outputs() == []


def test_the_index_page_has_no_link_that_leads_nowhere(build: dict[str, Any]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(build["RELATIVE_LINK"], text)
    assert len(links) > 10 and all((ROOT / target.partition("#")[0]).exists() for _, target in links)
    published = build["readme"](text, "https://example.org/a/b", "0.1.0")
    assert "(https://example.org/a/b/blob/v0.1.0/docs/sharding.md)" in published
    for shown in (published, build["readme"](text, "", "0.1.0")):
        assert not re.findall(build["RELATIVE_LINK"], shown)
    assert build["addresses"]("") == {"Paper": "https://arxiv.org/abs/2303.10512"}
    assert build["addresses"]("https://example.org/a/b")["Issues"] == "https://example.org/a/b/issues"


def test_in_a_clone_they_are_read_at_its_root() -> None:
    assert shipped.ROOT == ROOT and shipped.CONFIGS.is_dir()
    for kind in shipped.KINDS:
        assert shipped.files_of(kind), kind


def test_every_file_is_listed_with_what_it_is() -> None:
    text = listing()
    for kind in shipped.KINDS:
        for path in shipped.files_of(kind):
            assert path.stem in text
            assert about(path) or path.suffix == ".json", path
    assert max(map(len, text.splitlines()[:-1])) <= 120


def test_a_name_finds_the_file_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {
        ("llama_sft", ""): "recipes/llama_sft.py",
        ("llama_sft", ".sh"): "launch/llama_sft.sh",
        ("zero3", ""): "launch/accelerate/zero3.yaml",
        ("zero3.json", ""): "ds_configs/zero3.json",
        ("launch/slurm.sh", ""): "launch/slurm.sh",
        ("llama_sft_demo", ".yaml"): "recipes/configs/llama_sft_demo.yaml",
    }
    for (name, suffix), path in found.items():
        assert shipped.any_shipped(name, suffix) == ROOT / path
    assert "did you mean llama_sft" in refusal(shipped.any_shipped, "lama_sft")
    assert "fsdp is not an engine: did you mean fsdp2 or hsdp?" in refusal(shipped.shipped, "engine", "fsdp")
    assert "choose from ddp, fsdp2, hsdp, zero2, zero3; " in refusal(shipped.shipped, "engine", "tensor")
    config = "llama_commonsense_llama_7b"
    for name in (config, f"{config}.yaml", f"recipes/configs/{config}.yaml"):
        assert shipped.own_or_shipped(Path(name), "config") == shipped.CONFIGS / f"{config}.yaml"
    (tmp_path / config).write_text("")
    assert shipped.own_or_shipped(Path(config), "config") == Path(config)  # one's own comes first
    for name in ("no_such.yaml", "../README.md", "/no/such/ds_configs/zero3.json"):
        assert shipped.own_or_shipped(Path(name), "config") == Path(name) == shipped.config_file(name)
    for name in ("llama_sft_dem", "llama_sft_dem.yaml"):
        assert "there is no such file: did you mean llama_sft_demo" in refusal(shipped.config_file, name)


def test_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    main(["cp", "llama_sft", "my_recipe.py"])
    assert capsys.readouterr().out == "Copied: my_recipe.py\n"
    assert Path("my_recipe.py").read_bytes() == (ROOT / "recipes/llama_sft.py").read_bytes()
    assert copy("fsdp2", tmp_path) == tmp_path / "fsdp2.yaml" and copy("zero1", None) == Path("zero1.json")
    assert copy("slurm", Path("job.sh")).stat().st_mode & 0o100
    for name in ("one.yaml", "two.yaml"):  # the schema is written once
        main(["cp", "llama_sft_demo", name])
        copied, *beside = capsys.readouterr().out.splitlines()
        schema = "Editors complete and check it by llama_sft.schema.json, written beside it"
        assert (copied, beside) == (f"Copied: {name}", [schema] if name == "one.yaml" else [])
    assert "properties" in json.loads(Path("llama_sft.schema.json").read_text(encoding="utf-8"))
    assert "my_recipe.py exists already" in refusal(copy, "llama_sft", Path("my_recipe.py"))
    assert "in a folder that exists" in refusal(copy, "llama_sft", Path("nowhere/recipe.py"))
    with pytest.raises(SystemExit) as stopped:
        main(["cp", "lama_sft"])
    assert stopped.value.code == 2 and "did you mean llama_sft" in capsys.readouterr().err
    main(["ls"])
    assert capsys.readouterr().out.startswith("Recipes: ")
