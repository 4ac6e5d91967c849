"""The subcommand ``adalora-dist plan``: a recipe's dry run, and what it would be on a cluster."""

from __future__ import annotations

import argparse
import math
import runpy
import sys
from typing import Any

from adalora_dist.io.errors import UserError
from adalora_dist.io.launchers import options_among_flags
from adalora_dist.training.plan.cluster import CHOICES, FLOPS, LINK_BETWEEN_NODES, LINK_IN_NODE, PLANNED, Cluster


def _options() -> argparse.ArgumentParser:
    """The command's own; they may stand before the recipe or among its flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpus", default="1x80GB", metavar="NxGB", help="of one machine: 8x80GB; default: 1x80GB")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines; default: 1")
    parser.add_argument("--engine", choices=CHOICES, help="default: single for one GPU, else fsdp2")
    parser.add_argument(
        "--tflops", type=_rate, metavar="N", help=f"that a GPU sustains, 10^12 operations/s; default: {FLOPS / 1e12:g}"
    )
    inside, between = (f"{rate / 1e9:g}" for rate in (LINK_IN_NODE, LINK_BETWEEN_NODES))
    parser.add_argument(
        "--link", type=_rate, metavar="GB/s", help=f"that a GPU sends; default: {inside}, with more machines {between}"
    )
    return parser


def _rate(word: str) -> float:
    try:
        rate = float(word)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{word} must be a number > 0")
    return rate


def add_plan(commands: argparse._SubParsersAction[Any]) -> None:
    """Declare it among the others."""
    parser = commands.add_parser(
        "plan",
        help="memory, traffic, disk and time of a run on a cluster, before any GPU is there",
        parents=[_options()],
        allow_abbrev=False,
        usage="%(prog)s RECIPE [--gpus 8x80GB] [--nodes N] [--engine ENGINE] [FLAGS of the recipe]",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="as adalora-dist ls shows it, or a file: my_recipe.py")
    flags = parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="of the recipe")
    flags.required = False
    parser.set_defaults(run_command=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from adalora_dist.training.recipe_file import recipe_file

    options = _options()
    try:
        given, flags = options.parse_known_args(arguments.flags, arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"adalora-dist plan: {error}; see adalora-dist plan --help") from None
    flops, link = given.tflops and given.tflops * 1e12, given.link and given.link * 1e9
    cluster = Cluster.parse(given.gpus, given.nodes, given.engine, flops=flops, link=link)
    path = recipe_file(given.recipe)
    options_among_flags(options)
    sys.argv = [str(path), *flags, "--dry-run"]
    planned = PLANNED.set(cluster)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        PLANNED.reset(planned)
