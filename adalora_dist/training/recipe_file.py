"""Recipes by name or file, and the schemas of what one reads. Neither this nor a recipe by itself imports torch."""

from __future__ import annotations

import json
import runpy
import typing
from pathlib import Path

from adalora_dist.config.json_schema import json_schema
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.shipped import own_or_shipped, shipped


def recipe_file(recipe: str) -> Path:
    """The file of a recipe.

    Raises:
        UserError: it is neither shipped nor a file.
    """
    path = own_or_shipped(Path(recipe))
    return path if path.suffix == ".py" and path.is_file() else shipped("recipe", recipe)


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
