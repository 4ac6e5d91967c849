"""What pyproject.toml cannot say: files that a wheel carries inside of the package, and links for an index page.

Builds that are to be published set ADALORA_DIST_REPOSITORY to the address of the repository (.github/workflows): the
README's links then lead there, at the tag of this version. In other builds they are plain words.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
SHIPPED = ("recipes", "launch", "ds_configs")
SUFFIXES = (".py", ".yaml", ".json", ".sh")
RELATIVE_LINK = r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)"


def shipped() -> list[Path]:
    """Relative to the root of the clone."""
    files = [path.relative_to(HERE) for folder in SHIPPED for path in sorted((HERE / folder).rglob("*"))]
    return [path for path in files if path.suffix in SUFFIXES or path.name == "Dockerfile"]


def readme(text: str, repository: str, version: str) -> str:
    """The README as an index shows it, where nothing lies beside it."""
    target = rf"[\1]({repository}/blob/v{version}/\2)" if repository else r"\1 (\2)"
    return re.sub(RELATIVE_LINK, target, text)


def addresses(repository: str) -> dict[str, str]:
    """Links of the project."""
    own = {"Repository": "", "Documentation": "/tree/HEAD/docs", "Changelog": "/blob/HEAD/CHANGELOG.md"}
    own |= {"Issues": "/issues"}
    found = {name: repository + path for name, path in own.items()} if repository else {}
    return {**found, "Paper": "https://arxiv.org/abs/2303.10512"}


class BuildWithShipped(build_py):
    """Copies them to ``adalora_dist/_shipped``. ``pip install -e`` leaves them where they are: there they are read."""

    def _copies(self) -> dict[str, Path]:
        if self.editable_mode:
            return {}
        folder = Path(self.build_lib) / "adalora_dist" / "_shipped"
        return {str(folder / path): path for path in shipped()}

    def run(self) -> None:
        super().run()
        for copy, path in self._copies().items():
            Path(copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / path, copy)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._copies()]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *map(str, shipped())]


_REPOSITORY = os.environ.get("ADALORA_DIST_REPOSITORY", "").rstrip("/")
_VERSION = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

setup(
    cmdclass={"build_py": BuildWithShipped},
    long_description=readme((HERE / "README.md").read_text(encoding="utf-8"), _REPOSITORY, _VERSION),
    long_description_content_type="text/markdown",
    project_urls=addresses(_REPOSITORY),
)
