"""A run's ranks as pictures (SVG or PNG): maps of layers by matrices and by experts; how budget, scores, churn went."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalora_dist.io.errors import UserError, printable
from adalora_dist.io.foreign_files import read_records
from adalora_dist.io.marks import refuse_others
from adalora_dist.io.publish import write_whole, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator


_MARK = "drawn by adalora-dist inspect"
"""In every picture, among what it says of itself: a file without it is somebody's, and stays."""
_EXPERT = re.compile(r"(.*experts)\.(\d+)\.([^.]+)")
_NUMBERED_EXPERTS = 16
"""So many cells of a line have room for their numbers."""


def of_experts(pattern: Mapping[str, int]) -> dict[str, list[int]]:
    """The ranks of all experts of a layer for one projection, expert after expert, by the name that they share."""
    found: dict[str, dict[int, int]] = {}
    for name, rank in pattern.items():
        if match := _EXPERT.fullmatch(name):
            found.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = rank
    return {name: [ranks[expert] for expert in sorted(ranks)] for name, ranks in found.items()}


def expert_grids(pattern: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
    """By projection a line for each layer that has it: the ranks of its experts, as :func:`of_experts`."""
    grids: dict[str, dict[str, list[int]]] = {}
    for name, ranks in of_experts(pattern).items():
        layer, _, projection = name.rpartition(".")
        grids.setdefault(projection, {})[layer] = ranks
    return grids


def rank_grid(pattern: Mapping[str, int]) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """Lines (layers), columns (matrices) and the rank in each cell that there is, by line and column.

    A matrix goes by the end of its name, as much of it as no other matrix shares. A name without a layer number gets a
    line of its own. The experts of a layer are one matrix here, with the sum of their ranks (:func:`of_experts`).
    """
    sums = {name: sum(ranks) for name, ranks in of_experts(pattern).items()}
    pattern = {name: rank for name, rank in pattern.items() if not _EXPERT.fullmatch(name)} | sums
    places: dict[str, tuple[str, str]] = {}
    for name in pattern:
        match = re.match(r"(?P<stack>.*?)\.?(?P<layer>\d+)\.(?P<matrix>.*)$", name)
        places[name] = (f"{match['stack']}.{match['layer']}", match["matrix"]) if match else (name, "rank")
    columns = _short({matrix: None for _, matrix in places.values()})
    cells = {(layer, columns[matrix]): pattern[name] for name, (layer, matrix) in places.items()}
    return list(dict.fromkeys(layer for layer, _ in cells)), list(columns.values()), cells


def _short(names: Iterable[str]) -> dict[str, str]:
    """The shortest end of each name, from a dot on, that is the end of no other; the whole name where there is none."""
    parts = {name: name.split(".") for name in names}
    ends = Counter(".".join(words[k:]) for words in parts.values() for k in range(len(words)))
    return {
        name: next((e for k in reversed(range(len(words))) if ends[e := ".".join(words[k:])] == 1), name)
        for name, words in parts.items()
    }


def draw_rank_map(pattern: Mapping[str, int], path: Path) -> None:
    """Heat map of active ranks, layers down and matrices across, one number in each cell.

    Args:
        pattern: active rank by name of the adapted matrix.
        path: of the .svg or .png to write.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    lines, columns, cells = rank_grid(pattern)
    figure = _figure(2.6 + 0.75 * len(columns), 1.3 + 0.24 * len(lines))
    axes = figure.add_subplot()
    values = [[cells.get((line, column), float("nan")) for column in columns] for line in lines]
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    for (line, column), rank in cells.items():
        dark = rank < 0.6 * max(1, *pattern.values())
        axes.text(
            columns.index(column), lines.index(line), str(rank), ha="center", va="center", fontsize=7,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), [printable(name, 32) for name in columns], rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(lines)), [printable(name, 32) for name in lines], fontsize=8)
    axes.set_title(f"Active ranks: {sum(pattern.values())} triplets in {len(pattern)} matrices", fontsize=10)
    figure.colorbar(image, ax=axes, label="rank").locator = _whole_numbers()
    _save(figure, path)


def draw_expert_map(pattern: Mapping[str, int], path: Path) -> None:
    """Heat maps of experts, layers down and experts across, one for each projection; numbers where there is room.

    Args:
        pattern: active rank by name of the adapted matrix; some are experts' (:func:`of_experts`).
        path: of the .svg or .png to write.

    Raises:
        UserError: as :func:`draw_rank_map`.
    """
    grids = expert_grids(pattern)
    num_experts = max(len(ranks) for grid in grids.values() for ranks in grid.values())
    num_lines = sum(map(len, grids.values()))
    figure = _figure(3.2 + max(4.0, 0.09 * num_experts), 0.9 * (1 + len(grids)) + 0.16 * num_lines)
    heights = [len(grid) + 2 for grid in grids.values()]
    all_axes = figure.subplots(len(grids), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    largest = max(1, *(rank for grid in grids.values() for ranks in grid.values() for rank in ranks))
    for axes, (projection, grid) in zip(all_axes, grids.items(), strict=True):
        values = [[*ranks, *[float("nan")] * (num_experts - len(ranks))] for ranks in grid.values()]
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=largest, interpolation="nearest")
        if num_experts <= _NUMBERED_EXPERTS:
            for line, ranks in enumerate(grid.values()):
                for expert, rank in enumerate(ranks):
                    colour = "white" if rank < 0.6 * largest else "black"
                    axes.text(expert, line, str(rank), ha="center", va="center", fontsize=7, color=colour)
        shown = range(0, len(grid), -(-len(grid) // 32))
        names = list(grid)
        axes.set_yticks(shown, [printable(names[line], 32) for line in shown], fontsize=7)
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.tick_params(axis="x", labelsize=7)
        total, at_zero = (sum(f(ranks) for ranks in grid.values()) for f in (sum, lambda ranks: ranks.count(0)))
        axes.set_title(f"{printable(projection, 40)}: {total} triplets, {at_zero} experts at 0", fontsize=9)
    all_axes[-1].set_xlabel("expert", fontsize=8)
    figure.colorbar(image, ax=list(all_axes), label="rank").locator = _whole_numbers()
    _save(figure, path)


def rank_pictures(pattern: Mapping[str, int], folder: Path, ending: str) -> list[Path]:
    """Draw ``ranks``, and where experts are adapted ``experts``, into a folder; returns what was written.

    Raises:
        UserError: as :func:`draw_rank_map`.
    """
    drawn = [folder / f"ranks.{ending}"]
    draw_rank_map(pattern, drawn[0])
    if of_experts(pattern):
        drawn.append(folder / f"experts.{ending}")
        draw_expert_map(pattern, drawn[1])
    return drawn


def refuse_others_pictures(pattern: Mapping[str, int], folder: Path, ending: str, has_history: bool) -> None:
    """Raise a ``UserError`` if one of the pictures that are about to be drawn would replace a file of somebody's."""
    names = {"ranks": True, "experts": bool(of_experts(pattern)), "history": has_history}
    for path in (folder / f"{name}.{ending}" for name, is_drawn in names.items() if is_drawn):
        refuse_others(path, _MARK.encode(), "rename it, or add --pictures none, or another format")


def read_history(path: Path) -> list[dict[str, Any]]:
    """A run's allocations.jsonl; empty where there is none.

    Raises:
        UserError: it cannot be read, or a line lacks a number that the history has.
    """
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        values = {key: record.get(key) for key in ("step", "budget", "pruned", "returned")}
        score = record.get("lowest_kept_score")  # null where none stayed
        for key, value in (values if score is None else {**values, "lowest_kept_score": score}).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"{path}:{number}: {key} is {value!r:.50}, must be a number >= 0: remove the file")
    return records


def draw_history(allocations: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Over the steps of the run: budget, the score that a triplet needed to stay, triplets that left and came back.

    Args:
        allocations: from :func:`read_history`, see ``RunFolder.log_allocations``; at least one.
        path: of the .svg or .png to write.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    steps = [record["step"] for record in allocations]
    figure = _figure(7, 6)
    budget, score, churn = figure.subplots(3, sharex=True)
    first, last = allocations[0], allocations[-1]
    initial = first["budget"] + first["pruned"] - first["returned"]
    budget.step([0, *steps], [initial, *(record["budget"] for record in allocations)], where="post")
    budget.set_ylim(bottom=0)
    budget.set_title(f"{len(steps)} allocations: {initial} -> {last['budget']} triplets", fontsize=10)
    _label(budget, "budget, triplets")
    needed = [(s, record["lowest_kept_score"]) for s, record in zip(steps, allocations, strict=True)]
    scores = [(s, value) for s, value in needed if value] or [(steps[0], float("nan"))]
    score.plot(*zip(*scores, strict=True), marker=".")
    score.set_yscale("log")
    _label(score, "lowest score kept")
    width = 0.4 * min([b - a for a, b in zip(steps, steps[1:], strict=False)], default=1)
    churn.bar([s - width / 2 for s in steps], [record["pruned"] for record in allocations], width, label="pruned")
    churn.bar([s + width / 2 for s in steps], [record["returned"] for record in allocations], width, label="came back")
    churn.legend(fontsize=8)
    _label(churn, "triplets changed")
    churn.set_xlabel("step", fontsize=8)
    for axis in (budget.yaxis, churn.yaxis, churn.xaxis):
        axis.set_major_locator(_whole_numbers())
    _save(figure, path)


def _label(axes: Axes, text: str) -> None:
    axes.set_ylabel(text, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _whole_numbers() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _figure(width_inches: float, height_inches: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "pictures need matplotlib, which is not installed: pip install 'adalora-dist[plots]'"
        ) from error
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    """SVG or PNG by the file's ending. The same bytes for the same numbers: no date, fixed names; text stays text."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a name such as $\\frac{$ is no formula, and would end the drawing
        text.set_parse_math(False)
    metadata = {"Date": None, "Creator": _MARK} if path.suffix == ".svg" else {"Software": _MARK}
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "adalora-dist", "svg.fonttype": "none"}):
        figure.savefig(drawn, format=path.suffix[1:], dpi=150, metadata=metadata)
    with writing(path):
        write_whole(path, drawn.getvalue())
