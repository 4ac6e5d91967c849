"""Fixtures that tests of several rooms share; functions and classes that they share lie in ``support/``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_surroundings() -> Iterator[None]:
    """Each test leaves the environment and the working folder as they were: engines and launchers set variables that
    the next test of the same process would otherwise run under."""
    environment, folder = dict(os.environ), os.getcwd()
    yield
    os.chdir(folder)
    for name in os.environ.keys() - environment.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"})


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BART and tiny reports, of the tests of one file."""
    from tests.support.tiny_text_project import write_summarization  # torch, which many tests do without

    folder = tmp_path_factory.mktemp("summaries")
    write_summarization(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's cache, the test's own; not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(folder))
    return folder
