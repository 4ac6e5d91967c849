"""A run's YAML file: what ``--config`` reads.

It has a mapping per section. In ``adapter``, settings of one method can stand under its name, and are read when that
method is chosen; what stands in the section itself holds for every method, so that each method asked for must have it:

    adapter:
      targets: [q_proj, v_proj]
      adalora: {init_rank: 12, target_rank: 8}
      lora: {init_rank: 8}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from adalora_dist.config.foreign_names import setting_here
from adalora_dist.config.methods import METHODS, is_method
from adalora_dist.config.methods.base import foreign_setting, methods_with
from adalora_dist.config.sections import RunConfig
from adalora_dist.config.settings import owners, settings_by_flag
from adalora_dist.config.words import legal, near, remedy
from adalora_dist.io.errors import UserError
from adalora_dist.io.yaml_file import read_yaml

Origins = dict[tuple[str, str], str]
"""Of each setting that was given, by section and name: where, and as what."""


class RunFile:
    """What a file sets.

    Args:
        path: the YAML file; None: no file, which sets nothing.
        schema: ``RunConfig`` or a recipe's subclass of it.

    Raises:
        UserError: the file cannot be read, is not YAML, or has a section or a setting that nobody has.
    """

    def __init__(self, path: Path | None, schema: type[RunConfig]) -> None:
        self.path = path
        self._settings = settings_by_flag(schema)
        self._lines: dict[tuple[Any, ...], int] = {}
        self._values: dict[str, dict[str, Any]] = {section: {} for section in schema.model_fields}
        self._values_of_method: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
        self._origins: Origins = {}
        self._origins_of_method: dict[str, Origins] = {method: {} for method in METHODS}
        if path is not None:
            self._read(path)

    def value(self, section: str, name: str, default: Any) -> Any:
        """What the file sets for every method alike."""
        return self._values[section].get(name, default)

    def merge_into(self, values: dict[str, dict[str, Any]], method: Any) -> Origins:
        """Put what the file sets for ``method`` over ``values``; returns where each of its settings stands."""
        for section, content in self._values.items():
            values[section] |= content
        if not is_method(method):
            return self._origins
        values["adapter"] |= self._values_of_method[method]
        return self._origins | self._origins_of_method[method]

    def _read(self, path: Path) -> None:
        sections, self._lines = read_yaml(path)
        for section, content in sections.items():
            if section not in self._values:
                alike = owners(section, self._settings) or near(str(section), list(self._values))
                hint = f"did you mean {' or '.join(alike)}? " if alike else ""
                if not owners(section, self._settings) and (here := setting_here(section, self._settings)):
                    hint = f"here: {here}. "
                raise UserError(
                    f"{self._where(section)}: {section} is not a section: {hint}Sections are {', '.join(self._values)}"
                )
            of_methods = {}
            if section == "adapter" and isinstance(content, dict):
                of_methods = {name: content.pop(name) for name in METHODS if name in content}
            infos = {setting.name: setting.info for setting in self._settings.values() if setting.section == section}
            self._values[section] = self._group(content, infos, self._origins, section)
            for method, inner in of_methods.items():
                infos = {name: info for name, info in METHODS[method].model_fields.items() if name != "method"}
                found = self._group(inner, infos, self._origins_of_method[method], section, method)
                self._values_of_method[method] = found

    def _group(self, content: Any, infos: Mapping[str, FieldInfo], origins: Origins, *keys: str) -> dict[str, Any]:
        """The settings under ``keys``, checked by name; ``origins`` gets where each stands."""
        group = ".".join(keys)
        if content is None:  # every line of it is commented out
            return {}
        if not isinstance(content, dict):
            raise UserError(
                f"{self._where(*keys)}: section {group} must be a mapping, not {content!r}: indent its settings below "
                f"it, such as {next(iter(infos), 'setting')}: ..."
            )
        for name, value in content.items():
            where = self._where(*keys, name)
            if name not in infos:
                raise UserError(f"{where}: {self._no_such(name, infos, *keys)}")
            shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else value
            origins[keys[0], name] = f"{where}: {group}.{name}: {shown}"
            kind = infos[name].annotation
            is_switch = kind is bool or "on" in get_args(kind)
            if isinstance(value, bool) and not is_switch:  # pydantic would read true as 1
                raise UserError(f"{origins[keys[0], name]}: must be {legal(infos[name])}; {remedy(infos[name])}")
        return content

    def _no_such(self, name: Any, infos: Mapping[str, FieldInfo], *keys: str) -> str:
        group = ".".join(keys)
        alike = [f"{group}.{known}" for known in near(str(name), list(infos))]
        if len(keys) == 1:
            alike = owners(name, self._settings) or alike
        elif name != "method" and (others := methods_with(name)):
            lacks = foreign_setting(METHODS[keys[1]], name)
            return f"{group}.{name}: {lacks}, or put it under {keys[0]}.{others[0]}"
        hint = f"did you mean {' or '.join(alike)}?" if alike else f"it has {', '.join(infos) or 'none'}"
        if not owners(name, self._settings) and (here := setting_here(name, self._settings)):
            hint = f"here: {here}"
        return f"{name} is not a setting of {group}: {hint}"

    def _where(self, *keys: Any) -> str:
        return f"{self.path}:{self._lines[keys]}"
