"""What doctor says of this environment and of others, in a form that can be shown to anybody."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from adalora_dist.__main__ import main
from adalora_dist.training import doctor as module
from adalora_dist.training.doctor import FEATURES, doctor, packages, version_line
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT

VERSION = metadata.version
REQUIRES = [
    "torch<2.16,>=2.11",
    "pydantic<3,>=2.11",
    'deepspeed<0.20,>=0.19; extra == "deepspeed"',
    'pytest<10,>=8; extra == "dev"',
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions by name; what is not in it is not installed."""
    found = {"adalora-dist": "0.1.0", "torch": "2.15.0+cu132", "pydantic": "2.12.0", "deepspeed": "0.19.8"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    return found


def test_where_all_is_there(installed: dict[str, str]) -> None:
    text, has_all = doctor()
    assert has_all and text.endswith("All that a run needs is there.")
    assert text.startswith("adalora-dist 0.1.0, torch 2.15.0+cu132, Python 3.")
    for title in ("Packages", "Features", "Devices", "Launchers", "Disk", "Environment"):
        assert f"\n{title}\n  " in text
    assert "CPU: " in text and "GiB free" in text
    assert "pytest" not in text.partition("\nDevices\n")[0]  # of developers; folders may be called so
    [line] = [line for line in text.splitlines() if "ZeRO" in line]
    assert line.endswith(" ready")


def test_where_something_is_missing_or_untested(installed: dict[str, str]) -> None:
    installed["torch"] = "2.9.1"
    del installed["pydantic"], installed["deepspeed"]
    text, has_all = doctor()
    assert not has_all and "2.9.1 is outside of what is tested, <2.16,>=2.11" in text
    assert text.endswith("pip install 'torch<2.16,>=2.11' 'pydantic<3,>=2.11'")
    assert "deepspeed: missing; pip install 'adalora-dist[deepspeed]'" in text


def test_where_nothing_can_run(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reason_of_torch", lambda: "libcublas.so.13: cannot open shared object file")
    text, has_all = doctor()
    assert not has_all and "  torch cannot be imported: libcublas" in text and text.endswith("install it again")
    monkeypatch.undo()

    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    text, has_all = doctor()
    assert not has_all and text.endswith("pip install adalora-dist")


def test_it_can_be_shown_to_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "ADALORA_DIST_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    text, _ = doctor()
    assert str(tmp_path) not in text and "~/work" in text and "hf_" not in text


def test_features_are_the_extras_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(FEATURES) == set(project["optional-dependencies"]) - {"dev", "docs"}


def test_of_this_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"torch", "transformers"} <= {package.name for package in packages()[""]}
    assert f"torch {VERSION('torch')}, " in version_line()
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code in (0, 1) and capsys.readouterr().out.startswith("adalora-dist ")
    assert module.packages()["quant"]


def test_versions_cost_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "adalora_dist", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0 and done.stdout == version_line() + "\n"
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
