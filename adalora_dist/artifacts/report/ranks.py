"""Ranks over time: a table of layers and matrices whose cells a slider moves through the allocations of a run.

The table is the picture: each cell has its rank as a number, and its shade from a class. A page whose script does not
run shows the ranks that the run has now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from adalora_dist.artifacts.hub.pictures import expert_grids, rank_grid
from adalora_dist.artifacts.report.markup import breakable, folded, mean_and_sd, number, said, table
from adalora_dist.artifacts.report.runs import RunRecord

NUM_SHADES = 10
_ALL_RANKS = 40_000
"""Numbers in the frames of one page: where there are more allocations, every so-manieth is shown."""
_SHOWN_MATRICES = 16


def frames(run: RunRecord, limit: int) -> list[dict[str, Any]]:
    """The cells of the grid at the start and after allocations, at most ``limit``, the first and the last included."""

    def cells(ranks: Iterable[int]) -> list[int]:
        return list(rank_grid(dict(zip(run.initial_ranks, ranks, strict=True)))[2].values())

    found = [(0, sum(run.initial_ranks.values()), tuple(run.initial_ranks.values()))]
    found += [(a.step + 1, a.budget, a.ranks) for a in run.allocations]
    if len(found) > limit:
        found = [found[k] for k in sorted({round(i * (len(found) - 1) / (limit - 1)) for i in range(limit)})]
    return [{"step": step, "budget": budget, "ranks": cells(ranks)} for step, budget, ranks in found]


def frames_of(runs: Sequence[RunRecord]) -> list[list[dict[str, Any]]]:
    """The frames of each run, as the page's script reads them; empty for a run without allocations."""
    num_matrices = sum(len(run.initial_ranks) for run in runs) or 1
    limit = max(2, _ALL_RANKS // num_matrices)
    return [frames(run, limit) if run.allocations else [] for run in runs]


def rank_map(run: RunRecord, index: int, shown: Sequence[dict[str, Any]]) -> str:
    """The table of one run, with its slider where there are allocations; "" without ranks.

    Args:
        index: of the run in the data that the page's script reads.
        shown: from :func:`frames_of`.
    """
    if not run.pattern:
        return ""
    layers, columns, cells = rank_grid(run.pattern)
    largest = max([1, *cells.values(), *(r for frame in shown for r in frame["ranks"])])
    position = {place: k for k, place in enumerate(cells)}
    rows = []
    for layer in layers:
        line = [said(layer, 60)]
        for column in columns:
            rank = cells.get((layer, column))
            place = position.get((layer, column))
            line.append("" if rank is None else f'<b data-k="{place}" class="s{shade(rank, largest)}">{rank}</b>')
        rows.append(line)
    caption = f"{said(run.label, 60)}: active rank of each matrix, of {largest} at most"
    slider = ""
    if shown:
        last = len(shown) - 1
        slider = (
            f'<p class="slider"><label>Allocation <input type="range" min="0" max="{last}" value="{last}" '
            f'data-run="{index}" data-largest="{largest}" aria-describedby="at{index}"></label> '
            f'<output id="at{index}" aria-live="polite">{_at(shown[last])}</output></p>'
        )
    grid = table(caption, ["layer", *(breakable(said(c, 40)) for c in columns)], rows, "ranks")
    return f'<div class="map" data-map="{index}">{slider}{grid}</div>'


def expert_maps(run: RunRecord) -> str:
    """Folded tables of experts, layers down and experts across, one for each projection; "" without experts."""
    parts = []
    for projection, grid in expert_grids(run.pattern).items():
        largest = max(1, *(rank for ranks in grid.values() for rank in ranks))
        num_experts = max(map(len, grid.values()))
        rows = [
            [said(layer, 60), *(f'<b class="s{shade(rank, largest)}">{rank}</b>' for rank in ranks)]
            for layer, ranks in grid.items()
        ]
        caption = f"{said(run.label, 60)}: active rank of each expert, {said(projection, 40)}, of {largest} at most"
        parts.append(folded(caption, table(caption, ["layer", *map(str, range(num_experts))], rows, "ranks experts")))
    return "".join(parts)


def shade(rank: int, largest: int) -> int:
    """0 for rank 0, up to ``NUM_SHADES`` for the largest; the page's script counts the same."""
    return -(-max(0, rank) * NUM_SHADES // largest)


def matrices_table(runs: Sequence[RunRecord]) -> str:
    """Matrices by importance, where runs have recorded it, and else by rank; "" without ranks.

    With several runs over the same matrices there are mean ± sd of their ranks.
    """
    with_ranks = [run for run in runs if run.pattern]
    names = list(dict.fromkeys(name for run in with_ranks for name in run.pattern))
    if not names:
        return ""
    scored = [run for run in with_ranks if run.importance]

    def key(name: str) -> tuple[float, float]:
        ranks = [run.pattern[name] for run in with_ranks if name in run.pattern]
        # Scores of different runs are on scales of their own: each counts as a share of its run's.
        shares = [run.importance.get(name, 0.0) / (sum(run.importance.values()) or 1.0) for run in scored]
        return -sum(shares), -sum(ranks) / len(ranks)

    head = ["matrix"]
    for run in with_ranks:
        of = f", {said(run.label, 40)}" if len(with_ranks) > 1 else ""
        head += [f"rank{of}", *([f"importance{of}"] if run in scored else [])]
    head += ["rank, mean ± sd"] if len(with_ranks) > 1 else []
    rows = []
    for name in sorted(names, key=key):
        row = [breakable(said(name, 80))]
        for run in with_ranks:
            rank = run.pattern.get(name)
            row.append("–" if rank is None else f"{rank} of {run.initial_ranks.get(name)}")
            row += [number(run.importance.get(name), 3)] if run in scored else []
        ranks = [run.pattern[name] for run in with_ranks if name in run.pattern]
        row += [mean_and_sd(ranks, 3) if len(ranks) > 1 else "–"] if len(with_ranks) > 1 else []
        rows.append(row)
    by = "importance at the last allocation (mean score of a triplet)" if scored else "rank"
    shown = table(f"Matrices by {by}", head, rows[:_SHOWN_MATRICES], "names")
    rest = rows[_SHOWN_MATRICES:]
    return shown + (folded(f"{len(rest)} more", table(f"More matrices by {by}", head, rest, "names")) if rest else "")


def _at(frame: dict[str, Any]) -> str:
    return f"after step {frame['step']:,}: {frame['budget']:,} triplets"
