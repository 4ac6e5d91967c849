"""Recipes by name or file, and the schemas of what one reads. Neither this nor a recipe by itself imports torch."""

from __future__ import annotations

import json
import re
import runpy
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from adalora_dist.config.json_schema import json_schema
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.shipped import files_of, own_or_shipped, shipped

_CONFIGURATION = re.compile(r"^def configuration\(", re.MULTILINE)
_GUARD = re.compile(r"^if __name__ == ['\"]__main__['\"]:", re.MULTILINE)


def recipe_file(recipe: str) -> Path:
    """The file of a recipe.

    Raises:
        UserError: it is neither shipped nor a file.
    """
    path = own_or_shipped(Path(recipe))
    if path.suffix == ".py" and path.is_file():
        return path
    beside = Path(f"{recipe}.py")
    if beside.is_file() and recipe not in [file.stem for file in files_of("recipe")]:
        raise UserError(f"{recipe} is not a recipe that is shipped: did you mean {beside}?")
    return shipped("recipe", recipe)


def check_flags(path: Path, flags: Sequence[str]) -> None:
    """Have a recipe read its flags once, before several processes of it do: then one alone tells a mistake.

    A file that has no function ``configuration``, or would begin to run, or cannot be imported, is left to them.

    Raises:
        UserError: settings that do not fit each other.
        SystemExit: code 0 after ``--help``; code 2 after a flag that is wrong, told in one line on standard error.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if not (_CONFIGURATION.search(text) and _GUARD.search(text)):
        return
    search, sys.path = sys.path, [str(path.resolve().parent), *sys.path]  # what lies beside it, as when it is started
    try:
        runpy.run_path(str(path), run_name=path.stem)["configuration"](list(flags))
    except UserError:
        raise
    except Exception:  # where it happens is shown by the process that it happens in
        return
    finally:
        sys.path = search


def schema_text(recipe: str) -> str:
    """The JSON schema of a recipe's YAML file.

    Raises:
        UserError: as :func:`schema_of`.
    """
    return json.dumps(json_schema(schema_of(recipe), f"What {Path(recipe).stem} reads with --config"), indent=2)


def schema_of(recipe: str) -> type[RunConfig]:
    """What the function ``configuration`` of a recipe returns.

    Raises:
        UserError: there is no such recipe, or it has no such function.
    """
    path = recipe_file(recipe)
    names = runpy.run_path(str(path), run_name=path.stem)
    returned = typing.get_type_hints(names["configuration"]).get("return") if "configuration" in names else None
    if not (isinstance(returned, type) and issubclass(returned, RunConfig)):
        raise UserError(f"{path} is no recipe: it must have a function configuration(argv) -> RunConfig, or a subclass")
    return returned
