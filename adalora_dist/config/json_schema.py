"""The JSON schema of a recipe's YAML file, with which an editor completes and checks it.

It knows sections, settings, their types, words and bounds. Rules over several settings are checked by the run itself.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, create_model
from pydantic.fields import FieldInfo

from adalora_dist.config.methods import METHODS
from adalora_dist.config.sections import RunConfig
from adalora_dist.config.settings import settings_by_flag

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(schema: type[RunConfig], title: str) -> dict[str, Any]:
    """What ``--config`` takes for this recipe.

    Args:
        schema: ``RunConfig`` or a recipe's subclass of it.
        title: what the schema is called.
    """
    sections: dict[str, dict[str, FieldInfo]] = {section: {} for section in schema.model_fields}
    for setting in settings_by_flag(schema).values():
        sections[setting.section][setting.name] = setting.info
    properties = {section: _section(section, fields) for section, fields in sections.items()}
    for method, config in METHODS.items():
        own = {name: info for name, info in config.model_fields.items() if name != "method"}
        about = f"Read with method {method} alone: {(config.__doc__ or '').splitlines()[0]}"
        properties["adapter"]["properties"][method] = {**_section(method, own), "description": about}
    return {"$schema": _DIALECT, "title": title, "type": "object", "properties": properties,
            "additionalProperties": False}  # fmt: skip


def _section(name: str, fields: dict[str, FieldInfo]) -> dict[str, Any]:
    """A mapping of settings; a section whose lines are all commented out is null."""
    definitions: Any = {field: (info.annotation, info) for field, info in fields.items()}
    model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **definitions)
    found = model.model_json_schema()
    for field in found.get("properties", {}).values():
        field.pop("title", None)
        if "description" in field:
            field["description"] = " ".join(field["description"].split())
    found.pop("title", None)
    return {**found, "type": ["object", "null"]}
