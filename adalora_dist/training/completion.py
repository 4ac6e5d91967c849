"""What can stand next in an ``adalora-dist`` command line: subcommands, recipes, their flags, and words of those.

Shells ask ``adalora-dist complete`` at every press of the key, with the line as it is: there is nothing to be made
anew when a recipe changes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

from adalora_dist.config.settings import settings_by_flag
from adalora_dist.config.words import choices_of
from adalora_dist.io.shipped import KINDS, files_of
from adalora_dist.training.recipe_file import schema_of

SCRIPTS = {
    "bash": "complete -o bashdefault -o default -C 'adalora-dist complete' adalora-dist",
    "zsh": "(( $+functions[compdef] )) || { autoload -U compinit && compinit; }; "
    "autoload -U +X bashcompinit && bashcompinit && "
    "complete -o bashdefault -o default -C 'adalora-dist complete' adalora-dist",
    "fish": "complete -c adalora-dist -a '(env COMP_LINE=(commandline -cp) adalora-dist complete)'",
}
"""By shell: the line that its start-up file evaluates."""


Options = Mapping[str, Iterable[str]]
"""Of a subcommand: each with the words that it takes, where they are few."""


def candidates(line: str, commands: Mapping[str, Options]) -> list[str]:
    """Words that the last one of ``line`` can become.

    Args:
        line: what has been typed, from the program's name to the cursor.
        commands: subcommands, and the options of each.
    """
    *before, last = _words(line)
    return [word for word in _next(before[1:], last, commands) if word.startswith(last)]


def _words(line: str) -> list[str]:
    """At least the program's name and what is being typed, which may be nothing yet."""
    try:
        words = shlex.split(line)
    except ValueError:  # an open quote
        words = line.split()
    return words + [""] if not words or re.search(r"\s$", line) else words


def _next(before: list[str], last: str, commands: Mapping[str, Options]) -> Iterable[str]:
    recipes = [path.stem for path in files_of("recipe")]
    if not before:
        return commands
    options = commands.get(before[0], {})
    if before[0] in ("run", "plan", "schema") and len(before) == 1:
        return recipes
    if before[0] == "cp" and len(before) == 1:
        return [path.stem for kind in KINDS for path in files_of(kind)]
    if before == ["completion"]:
        return SCRIPTS
    if words := [*options.get(before[-1], ())]:
        return words
    if before[0] not in ("run", "plan"):
        return options if last else []  # files, which the shell knows
    if before[-1] == "--engine":
        return ["single", *(path.stem for path in files_of("engine"))]
    if before[-1] == "--config":
        return [path.stem for path in files_of("config") if path.stem.startswith(before[1])]
    try:
        settings = settings_by_flag(schema_of(before[1]))
    except (Exception, SystemExit):  # of a recipe that cannot be imported as it is: the prompt is no place to say so
        return options
    flag = next((word for word in reversed(before) if word.startswith("--")), "")
    words = choices_of(settings[flag[2:]].info) if flag[2:] in settings else []
    switches = [f"--no-{name}" for name, setting in settings.items() if setting.info.annotation is bool]
    return [*words, *options, "--config", *(f"--{name}" for name in settings), *switches]
