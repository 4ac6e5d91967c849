"""Files that come with the package and are no code of it: recipes, configurations, launch and DeepSpeed files.

In a clone, and installed from one with ``pip install -e``, they are the folders at its root; a wheel has copies of them
in ``adalora_dist/_shipped`` (``setup.py``). Whatever names one as a clone does, ``ds_configs/zero3.json``, finds it in
both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from adalora_dist.io.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = _PACKAGE / "_shipped"
ROOT = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent
"""What ``recipes``, ``launch`` and ``ds_configs`` lie in."""
CONFIGS = ROOT / "recipes" / "configs"
"""Of the recipes: their demonstrations and experiments, tables of presets, architectures."""


class Kind(NamedTuple):
    """Shipped files that are used alike."""

    title: str
    pattern: str
    """Of their paths under ``ROOT``."""


KINDS = {
    "recipe": Kind("Recipes: adalora-dist run NAME", "recipes/*.py"),
    "config": Kind("Experiments: adalora-dist run RECIPE --config NAME", "recipes/configs/*.yaml"),
    "engine": Kind("Engines: adalora-dist run RECIPE --engine NAME -n PROCESSES", "launch/accelerate/*.yaml"),
    "deepspeed": Kind("DeepSpeed configurations: --engine zero3 --deepspeed-config FILE", "ds_configs/*.json"),
    "script": Kind("Launch scripts: bash FILE, or sbatch FILE", "launch/*.sh"),
    "image": Kind("Image of a container, without a GPU or with CUDA: docker build --file FILE", "launch/docker/*"),
}
"""In the order in which a name is looked up and all are listed."""
_FEW = 8
"""So many names are told in an error; of more there is a list to look at."""


def files_of(kind: str) -> list[Path]:
    """All shipped files of one of ``KINDS``, by name."""
    return sorted(ROOT.glob(KINDS[kind].pattern))


def shipped(kind: str, name: str, others: Sequence[str] = ()) -> Path:
    """The file of this kind whose name, without suffix, is ``name``.

    Args:
        others: names that would have been right, too, and have no file; for the error.

    Raises:
        UserError: there is none.
    """
    files = {path.stem: path for path in files_of(kind)}
    if name not in files:
        raise UserError(f"{name} is not {'an' if kind == 'engine' else 'a'} {kind}: {_remedy(name, [*others, *files])}")
    return files[name]


def own_or_shipped(path: Path, kind: str = "") -> Path:
    """``path`` where there is such a file, or else what is shipped under this path, or, of ``kind``, by this name.

    Where there is neither it is ``path``: who opens it says so.
    """
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    candidates = [ROOT / path]
    if kind and len(path.parts) == 1:
        candidates += [file for file in files_of(kind) if str(path) in (file.stem, file.name)]
    return next((file for file in candidates if file.is_file()), path)


def config_file(word: str) -> Path:
    """What ``--config`` means: a file, or the name of a shipped experiment. Where it is neither, who opens it says so.

    Raises:
        UserError: it is nearly such a name.
    """
    path = own_or_shipped(Path(word), "config")
    names = [file.stem for file in files_of("config")]
    if len(path.parts) == 1 and not path.exists() and (hint := did_you_mean(path.stem, names)):
        raise UserError(f"--config {word}: there is no such file: {hint}adalora-dist ls shows all")
    return path


def any_shipped(name: str, suffix: str = "") -> Path:
    """What ``name`` means: a file's name with or without suffix, or its path as in a clone.

    Args:
        suffix: of several files with this name, those that end so are meant.

    Raises:
        UserError: there is none.
    """
    found = [path for path in _all() if name in (path.stem, path.name, path.relative_to(ROOT).as_posix())]
    if not found:
        raise UserError(f"{name} is not among what is shipped: {_remedy(name, [path.stem for path in _all()])}")
    return next((path for path in found if path.suffix == suffix), found[0])


def _all() -> Iterator[Path]:
    for kind in KINDS:
        yield from files_of(kind)


def _remedy(name: str, names: list[str]) -> str:
    hint = did_you_mean(name, names)
    if not hint and len(names) <= _FEW:
        hint = f"choose from {', '.join(names)}; "
    return f"{hint}adalora-dist ls shows all"


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """A question with up to three names like this one, and a space; "" without any."""
    alike = [*dict.fromkeys(difflib.get_close_matches(name, names, n=3, cutoff=0.6))]
    return f"did you mean {' or '.join(alike)}? " if alike else ""
