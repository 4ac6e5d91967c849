"""A run's YAML file: what ``--config`` reads.

It has a mapping per section. In ``adapter``, settings of one method can stand under its name, and are read when that
method is chosen; what stands in the section itself holds for every method, so that each method asked for must have it:

    adapter:
      targets: [q_proj, v_proj]
      adalora: {init_rank: 12, target_rank: 8}
      lora: {init_rank: 8}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from adalora_dist.config.methods import METHODS
from adalora_dist.config.sections import RunConfig
from adalora_dist.config.settings import legal, near, owners, remedy, settings_by_flag
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
        self._values: dict[str, dict[str, Any]] = {section: {} for section in schema.model_fields}
        self._values_of_method: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
        self._origins: Origins = {}
        self._origins_of_method: dict[str, Origins] = {method: {} for method in METHODS}
        if path is not None:
            self._read(path, schema)

    def value(self, section: str, name: str, default: Any) -> Any:
        """What the file sets for every method alike."""
        return self._values[section].get(name, default)

    def merge_into(self, values: dict[str, dict[str, Any]], method: str) -> Origins:
        """Put what the file sets for ``method`` over ``values``; returns where each of its settings stands."""
        for section, content in self._values.items():
            values[section] |= content
        values["adapter"] |= self._values_of_method[method]
        return self._origins | self._origins_of_method[method]

    def _read(self, path: Path, schema: type[RunConfig]) -> None:
        sections, lines = read_yaml(path)
        settings = settings_by_flag(schema)
        for section, content in sections.items():
            where = f"{path}:{lines[section,]}"
            if section not in schema.model_fields:
                alike = owners(section, settings) or near(str(section), list(schema.model_fields))
                hint = f"did you mean {' or '.join(alike)}? " if alike else ""
                known = ", ".join(schema.model_fields)
                raise UserError(f"{where}: {section} is not a section: {hint}Sections are {known}")
            names = {setting.name: setting.info for setting in settings.values() if setting.section == section}
            for name, value in _mapping(content, f"section {section}", names, where):
                where = f"{path}:{lines[section, name]}"
                if section == "adapter" and name in METHODS:
                    own = {n: info for n, info in METHODS[name].model_fields.items() if n != "method"}
                    for inner, inner_value in _mapping(value, f"{section}.{name}", own, where):
                        where = f"{path}:{lines[section, name, inner]}"
                        if inner not in own:
                            alike = [f"{section}.{name}.{n}" for n in near(str(inner), list(own))]
                            raise _unknown(where, inner, f"{section}.{name}", alike, own)
                        shown = _shown(where, f"{section}.{name}.{inner}", inner_value, own[inner])
                        self._origins_of_method[name][section, inner] = shown
                        self._values_of_method[name][inner] = inner_value
                    continue
                if name not in names:
                    alike = owners(name, settings) or [f"{section}.{n}" for n in near(str(name), list(names))]
                    raise _unknown(where, name, section, alike, names)
                self._origins[section, name] = _shown(where, f"{section}.{name}", value, names[name])
                self._values[section][name] = value


def _mapping(content: Any, what: str, names: Mapping[str, Any], where: str) -> Iterable[tuple[Any, Any]]:
    """The items of a group of settings; none where every line of it is commented out."""
    if content is None:
        return ()
    if not isinstance(content, dict):
        example = next(iter(names), "setting")
        raise UserError(
            f"{where}: {what} must be a mapping, not {content!r}: indent its settings below it, such as {example}: ..."
        )
    return content.items()


def _unknown(where: str, name: Any, group: str, alike: list[str], names: Mapping[str, Any]) -> UserError:
    hint = f"did you mean {' or '.join(alike)}?" if alike else f"it has {', '.join(names) or 'none'}"
    return UserError(f"{where}: {name} is not a setting of {group}: {hint}")


def _shown(where: str, name: str, value: Any, info: FieldInfo) -> str:
    """``file:line: section.key: value``."""
    shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else value
    origin = f"{where}: {name}: {shown}"
    if isinstance(value, bool) and info.annotation is not bool:  # pydantic would read true as 1
        raise UserError(f"{origin}: must be {legal(info)}; {remedy(info)}")
    return origin
