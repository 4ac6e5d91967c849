"""The site beside what the repository shows: pages of benchmarks that the documentation links to are pages of it, and a
page that nobody has put into its navigation yet stands at the end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\(\.\./(benchmarks/[\w./-]+\.md)")


def pages_of(nav: Any) -> list[str]:
    """All pages that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(part)]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put what the navigation does not name under More."""
    assert config.nav is not None
    named = pages_of(config.nav)
    if others := [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named]:
        config.nav.append({"More": others})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every page of benchmarks that a page of the documentation links to."""
    linked = {target for page in (ROOT / "docs").glob("*.md") for target in _LINK.findall(page.read_text("utf-8"))}
    for target in sorted(linked):
        content = re.sub(r"\]\((?!https?:|#)[^)]+\)", "]", (ROOT / target).read_text("utf-8"))  # what lies beside it
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """The same links, as the site has them."""
    return _LINK.sub(r"](\1", markdown)
