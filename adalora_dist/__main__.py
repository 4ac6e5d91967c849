"""The command ``adalora-dist``: what can be done with a run once it is there.

    adalora-dist inspect RUN                           ranks, history, sizes
    adalora-dist export RUN --to merged|lora|peft      a model for transformers, or an adapter for PEFT and vLLM
    adalora-dist push RUN NAMESPACE/NAME               an export and its model card, to the Hub
    adalora-dist report RUN [RUN ...]                  one HTML file: curves, ranks over time, scores, samples

RUN is the folder of a finished run, or a checkpoint in one. Each subcommand imports what it needs when it is called,
so that ``--help`` and mistakes cost no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from adalora_dist.artifacts.report.command import add_report
from adalora_dist.config.flags import fail, user_errors
from adalora_dist.config.formats import ADAPTER_FORMATS, EXPORT_FORMATS
from adalora_dist.io.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand. Mistakes end with code 2 and one line on standard error."""
    with user_errors(resumable=False):
        arguments = _parser().parse_args(argv)
        arguments.run_command(arguments)


def _parser() -> _Parser:
    parser = _Parser(
        "adalora-dist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_export(commands)
    _add_inspect(commands)
    _add_push(commands)
    add_report(commands)
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
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
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
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} must be an integer >= 1")
    return int(word)


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
