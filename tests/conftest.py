"""Fixtures that tests of several rooms share; functions and classes that they share lie in ``support/``."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's cache, the test's own; not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(folder))
    return folder
