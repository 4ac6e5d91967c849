"""The command ``adalora-dist``: to start a run, and what can be done with one once it is there.

    adalora-dist ls                                    recipes, experiments, engines: all that is shipped
    adalora-dist cp NAME FILE                          one of them, to be edited
    adalora-dist run RECIPE [--engine fsdp2 -n 8] ...  train; without flags the recipe's demonstration
    adalora-dist plan RECIPE --gpus 8x80GB ...         does it fit, what travels, how long: before any GPU is there
    adalora-dist schema RECIPE                         JSON schema of a recipe's YAML file, for editors
    adalora-dist completion bash|zsh|fish              the line that lets the shell complete this command
    adalora-dist doctor                                what is installed, and what is missing for which feature
    adalora-dist inspect RUN                           ranks, history, sizes
    adalora-dist export RUN --to merged|lora|peft      a model for transformers, or an adapter for PEFT and vLLM
    adalora-dist push RUN NAMESPACE/NAME               an export and its model card, to the Hub
    adalora-dist watch RUN                             loss, budget and ranks in the terminal, while it goes on
    adalora-dist report RUN [RUN ...]                  one HTML file: curves, ranks over time, scores, samples

RUN is the folder of a run; inspect, watch and report take one that is not finished, export a checkpoint in one. Each
subcommand imports what it needs when it is called, so that ``--help`` and mistakes cost no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from adalora_dist.artifacts.report.command import add_report, add_watch
from adalora_dist.config.flags import fail, user_errors
from adalora_dist.config.formats import ADAPTER_FORMATS, EXPORT_FORMATS
from adalora_dist.io.errors import UserError
from adalora_dist.io.launchers import options_among_flags
from adalora_dist.io.shipped import did_you_mean
from adalora_dist.io.terminal import page
from adalora_dist.training.plan.command import add_plan


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}; see {self.prog} --help")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from adalora_dist.training.doctor import version_line

        print(version_line())
        parser.exit()


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand. Mistakes end with code 2 and one line on standard error."""
    with user_errors(resumable=False):
        words = sys.argv[1:] if argv is None else list(argv)
        parser = _parser()
        _check_command(parser, words)
        arguments = parser.parse_args(words, argparse.Namespace(words=words))
        arguments.run_command(arguments)


def _check_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    given = next((word for word in words if not word.startswith("-")), None)
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if given is not None and given not in commands.choices:
        shown = [command for command in commands.choices if command != "complete"]
        hint = did_you_mean(given, shown) or f"choose from {', '.join(shown)}; "
        raise UserError(f"{given} is not a command: {hint}adalora-dist --help says what each does")


def _parser() -> _Parser:
    parser = _Parser(
        "adalora-dist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="of this package, torch, transformers, Python")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_ls(commands)
    _add_cp(commands)
    _add_run(commands)
    add_plan(commands)
    _add_schema(commands)
    _add_completion(commands)
    _add_doctor(commands)
    _add_export(commands)
    _add_inspect(commands)
    _add_push(commands)
    add_watch(commands)
    add_report(commands)
    return parser


def _add_ls(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("ls", help="recipes, experiments, engines: all that is shipped", allow_abbrev=False)
    parser.set_defaults(run_command=_ls)


def _add_cp(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("cp", help="copy what is shipped, to be edited", allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", help="as adalora-dist ls shows it, with or without suffix")
    parser.add_argument("to", type=Path, nargs="?", metavar="FILE", help="must not exist; default: here, as NAME is")
    parser.set_defaults(run_command=_cp)


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    placement = _placement()
    parser = commands.add_parser(
        "run",
        help="train with a recipe",
        parents=[placement],
        allow_abbrev=False,
        usage="%(prog)s RECIPE [--engine ENGINE] [-n PROCESSES] [--nodes NODES] [FLAGS of the recipe]",
        epilog="adalora-dist run RECIPE --help shows the flags of a recipe.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="as adalora-dist ls shows it, or a file: my_recipe.py")
    flags = parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="of the recipe")
    flags.required = False
    parser.set_defaults(run_command=_run)


def _add_schema(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("schema", help="JSON schema of a recipe's YAML file, for editors", allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE", help="as adalora-dist ls shows it, or a file: my_recipe.py")
    parser.set_defaults(run_command=_schema)


def _add_completion(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("completion", help="for a shell's start-up file", allow_abbrev=False)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help='eval "$(adalora-dist completion bash)"')
    parser.set_defaults(run_command=_completion)
    asked = commands.add_parser("complete", add_help=False)  # by the shell, which appends words of its own
    asked.add_argument("words_of_shell", nargs=argparse.REMAINDER)
    asked.set_defaults(run_command=lambda arguments: _complete(commands.choices))


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "doctor", help="versions, devices, launchers, disk, what is missing for which feature", allow_abbrev=False
    )
    parser.set_defaults(run_command=_doctor)


def _placement() -> _Parser:
    """Options of ``run`` that say on which processes; they stand before or among the flags of the recipe."""
    parser = _Parser(prog="adalora-dist run", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--engine", metavar="ENGINE", help="single, ddp, fsdp2, hsdp, zero2, zero3; default: single, or ddp of several")
    add("-n", "--processes", type=_at_least_1, metavar="N", help="on each machine; default: one per GPU, or one")
    add("--nodes", type=_at_least_1, metavar="N", help="number of machines; the same line is run on each. default: 1")
    add("--node-rank", type=_at_least_0, metavar="K", help="number of this machine, from 0; default: SLURM's")
    add("--main-address", metavar="HOST[:PORT]", help="of machine 0; default: SLURM's first, port 29500")
    add("--deepspeed-config", type=Path, metavar="FILE", help="in place of the one that zero2 or zero3 has")
    add("--restarts", type=_at_least_0, default=0, metavar="N", help="after a failure start again, N times at most")
    return parser


def _add_export(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("export", help="write a run in a form that others load", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or a checkpoint in one")
    parser.add_argument(
        "--to",
        required=True,
        choices=EXPORT_FORMATS,
        help="; ".join(f"{name}: {what}" for name, what in EXPORT_FORMATS.items()),
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="must not exist; default: RUN/FORMAT")
    parser.add_argument("--base", metavar="MODEL", help="Hub id or folder of the base model, if it has moved")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of what is written; auto: as the base's files, or float32 for adapters",
    )
    parser.add_argument(
        "--merge-into",
        choices=("original", "dequantized"),
        help="merged, of a quantised run: weights that the adapters are added to; default: as the run was configured",
    )
    parser.add_argument("--rank", type=_at_least_1, metavar="N", help="dylora: the rank to export, of those trained")
    parser.add_argument("--max-rank", type=_at_least_1, metavar="N", help="refuse matrices of a higher rank")
    parser.add_argument("--fold", action="store_true", help="cut ranks above --max-rank instead, by truncated SVD")
    parser.add_argument("--pad", action="store_true", help="lora: one rank and alpha for all matrices, by adding zeros")
    parser.set_defaults(run_command=_export)


def _add_inspect(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("inspect", help="ranks, history and sizes of a run", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run; not finished: its newest checkpoint")
    parser.add_argument(
        "--pictures",
        default="svg",
        choices=("svg", "png", "none"),
        help="how to draw RUN/ranks and RUN/history; default: svg",
    )
    parser.set_defaults(run_command=_inspect)


def _add_push(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser("push", help="upload an export and its model card to the Hub", allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="RUN_OR_EXPORT", help="folder of a run, or of one of its exports")
    parser.add_argument("repo_id", metavar="NAMESPACE/NAME", help="repository; created, private, if there is none")
    parser.add_argument("--to", default="merged", choices=EXPORT_FORMATS, help="which export of RUN")
    parser.add_argument("--public", action="store_true", help="push to a public repository")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="branch to push to; default: main")
    parser.add_argument(
        "--base-license", default="", metavar="NAME", help="of the base model, for the card; default: as in the run"
    )
    parser.set_defaults(run_command=_push)


def _at_least_1(word: str) -> int:
    return _at_least(1, word)


def _at_least_0(word: str) -> int:
    return _at_least(0, word)


def _at_least(limit: int, word: str) -> int:
    if not word.isdecimal() or int(word) < limit:
        raise argparse.ArgumentTypeError(f"{word} must be an integer >= {limit}")
    return int(word)


def _ls(arguments: argparse.Namespace) -> None:
    from adalora_dist.training.shelf import listing

    page(listing())


def _cp(arguments: argparse.Namespace) -> None:
    from adalora_dist.training.shelf import copy, write_schema

    copied = copy(arguments.name, arguments.to)
    print(f"Copied: {copied}")
    if schema := write_schema(copied):
        print(f"Editors complete and check it by {schema}, written beside it")


def _run(arguments: argparse.Namespace) -> None:
    from adalora_dist.training.start import Placement, start

    command = ["adalora-dist", *arguments.words]
    options = _placement()
    given, flags = options.parse_known_args(arguments.flags, arguments)
    options_among_flags(options)
    placement = Placement(
        given.engine, given.processes, given.nodes, given.node_rank, given.main_address, given.deepspeed_config,
        given.restarts,
    )  # fmt: skip
    start(given.recipe, placement, flags, command)


def _schema(arguments: argparse.Namespace) -> None:
    from adalora_dist.training.recipe_file import schema_text

    page(schema_text(arguments.recipe))


def _completion(arguments: argparse.Namespace) -> None:
    from adalora_dist.training.completion import SCRIPTS

    print(SCRIPTS[arguments.shell])


def _complete(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    from adalora_dist.training.completion import candidates

    line = os.environ.get("COMP_LINE", "")
    point = os.environ.get("COMP_POINT", "")
    typed = line[: int(point)] if point.isascii() and point.isdecimal() and len(point) < 10 else line
    options = {
        command: {name: action.choices or () for action in parser._actions for name in action.option_strings}
        for command, parser in commands.items()
        if command != "complete"
    }
    print("\n".join(candidates(typed, options)))


def _doctor(arguments: argparse.Namespace) -> None:
    from adalora_dist.training.doctor import doctor

    text, has_all = doctor()
    page(text)
    raise SystemExit(0 if has_all else 1)


def _export(arguments: argparse.Namespace) -> None:
    given = arguments
    if given.fold and given.max_rank is None:
        raise UserError("--fold without --max-rank: say to which rank, such as --max-rank 16")
    if given.merge_into and given.to in ADAPTER_FORMATS:
        raise UserError(f"--merge-into {given.merge_into} with --to {given.to}: only a merged model has a base in it")
    if given.pad and given.to != "lora":
        raise UserError(f"--pad with --to {given.to}: only plain LoRA has one rank for each matrix; use --to lora")
    from adalora_dist.artifacts.commands import export_run

    export_run(
        given.run, given.to, given.out, given.base, given.dtype, given.merge_into, given.max_rank, given.fold,
        given.pad, given.rank,
    )  # fmt: skip


def _inspect(arguments: argparse.Namespace) -> None:
    from adalora_dist.artifacts.commands import inspect_run

    inspect_run(arguments.run, arguments.pictures)


def _push(arguments: argparse.Namespace) -> None:
    from adalora_dist.artifacts.hub.push import push

    address = push(
        arguments.folder,
        arguments.repo_id,
        arguments.to,
        arguments.public,
        arguments.revision,
        arguments.base_license,
    )
    print(f"Pushed: {address}")


if __name__ == "__main__":
    main()
