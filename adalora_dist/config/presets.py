"""Tables of published settings, picked by flags: ``--preset paper --task cola --budget 0.3M``.

A table is a YAML file. It holds sections of settings as a configuration file does, and besides them *axes*: a word
that is no section, and under it a mapping from each word that the flag of this name takes to more of the same.

    train: {batch_size: 32}              # every row
    task:
      cola:
        train: {learning_rate: 5.0e-4}   # --task cola
        preset:
          paper: {}
          code: {train: {learning_rate: 8.0e-4}}   # --task cola --preset code

What stands deeper wins. An axis that is reached must have the word that was given, so that no row is taken by mistake.
An axis is a setting of the recipe (task, method), or exists for the table alone (preset, budget).

A row is for every method that its table lists: of the ``adapter`` section, the one that is chosen takes what it has.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adalora_dist.io.errors import UserError
from adalora_dist.io.yaml_file import read_yaml

Values = dict[str, dict[str, Any]]
"""Settings by section and name."""


class PresetTable:
    """One table.

    Args:
        path: the YAML file.
        sections: names of the schema's sections; every other word of a fragment is an axis.

    Raises:
        UserError: the file cannot be read or is no mapping, or an axis is not a mapping.
    """

    def __init__(self, path: Path, sections: Sequence[str]) -> None:
        self.path = path
        self._sections = tuple(sections)
        self._root, _ = read_yaml(path)
        self.axes: tuple[str, ...] = tuple(dict.fromkeys(self._axes_of(self._root)))
        """Names of all axes, in the order of the file, as flags spell them."""

    def resolve(self, choice: Mapping[str, str]) -> Values:
        """The settings of one row.

        Args:
            choice: axis -> word; axes that the row does not reach must not be in it, unless they are None.

        Raises:
            UserError: an axis has no word or another one, or a word was given for an axis that the row does not reach.
        """
        values: Values = {}
        used: set[str] = set()
        self._merge(self._root, choice, values, used)
        if unused := [axis for axis in self.axes if axis in choice and axis not in used]:
            said = ", ".join(f"{axis} {choice[axis]}" for axis in self.axes if axis in used)
            raise UserError(f"--{unused[0]} {choice[unused[0]]} is not read with {said}: leave it out")
        return values

    def rows(self) -> Iterator[dict[str, str]]:
        """The choice of every row."""
        return self._rows([self._root], {})

    def axes_besides(self, settings: Container[str]) -> list[str]:
        """The axes that are no settings of the recipe, and so need flags of their own."""
        return [axis for axis in self.axes if axis not in settings]

    def words(self, axis: str) -> list[str]:
        """What ``axis`` can be, over all rows."""
        return [*dict.fromkeys(row[axis] for row in self.rows() if axis in row)]

    def _merge(self, fragment: Mapping[str, Any], choice: Mapping[str, str], values: Values, used: set[str]) -> None:
        for section in self._sections:
            values.setdefault(section, {}).update(fragment.get(section, {}))
        for axis in self._own_axes(fragment):
            words, word = fragment[axis], choice.get(axis)
            if word not in words:
                problem = "is not set" if word is None else f"{word} has no row in {self.path.name}"
                raise UserError(f"--{axis} {problem}: must be one of {', '.join(words)}")
            used.add(axis)
            self._merge(words[word], choice, values, used)

    def _rows(self, fragments: list[Mapping[str, Any]], choice: dict[str, str]) -> Iterator[dict[str, str]]:
        for index, fragment in enumerate(fragments):
            for axis in self._own_axes(fragment):
                rest = [{a: fragment[a] for a in self._own_axes(fragment) if a != axis}, *fragments[index + 1 :]]
                words = [choice[axis]] if axis in choice else list(fragment[axis])
                for word in words:
                    yield from self._rows([fragment[axis][word], *rest], {**choice, axis: word})
                return
        yield choice

    def _own_axes(self, fragment: Mapping[str, Any]) -> list[str]:
        return [word for word in fragment if word not in self._sections]

    def _axes_of(self, fragment: Mapping[str, Any]) -> Iterator[str]:
        for axis in self._own_axes(fragment):
            if not isinstance(fragment[axis], dict) or not all(isinstance(f, dict) for f in fragment[axis].values()):
                raise UserError(f"{self.path}: {axis} is no section, so it must map words of --{axis} to settings")
            yield axis
            for inner in fragment[axis].values():
                yield from self._axes_of(inner)
