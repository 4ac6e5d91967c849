"""``adalora-dist watch``: a run in the terminal, finished or not: loss, budget, ranks of all matrices.

It reads what the run has written and asks nothing of the run itself, so that it may look on from another machine.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from adalora_dist.artifacts.hub.pictures import rank_grid
from adalora_dist.artifacts.report.markup import number
from adalora_dist.artifacts.report.ranks import shade
from adalora_dist.artifacts.report.runs import Point, RunRecord
from adalora_dist.artifacts.tables import aligned
from adalora_dist.io.errors import printable
from adalora_dist.io.progress import duration
from adalora_dist.io.redaction import redacted
from adalora_dist.io.terminal import clear, page, say

_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
"""From the lowest to the highest; the latter for terminals that lack the former."""
_SHADES = (236, 17, 18, 19, 20, 26, 32, 38, 44, 50, 86)
"""Of the terminal's 256 colours, from rank 0 to the largest."""
_CURVE_WIDTH, _BESIDE_CURVE = 48, 42
"""Characters of a curve, and of its name and values."""
_SILENT_SECONDS, _SILENT_STEPS = 120.0, 10
"""A run that has written nothing for so long, and for the time of so many steps, may have ended."""
_CURVES = {
    "loss": "training loss", "eval_loss": "validation loss", "budget": "budget", "gradient_norm": "gradient norm",
}  # fmt: skip


def watch(path: Path, every_seconds: float, once: bool) -> None:
    """Show a run, again and again until it has finished; once, if asked to or where there is no terminal.

    Raises:
        UserError: it is no run, or a file of it cannot be read.
    """
    is_live = sys.stdout.isatty() and not once
    while True:
        run = RunRecord.read(path, path.resolve().name)
        width, height = shutil.get_terminal_size() if is_live else (None, None)
        in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        shown = view(run, height, in_colour, width, _bars_of(sys.stdout.encoding))
        if not is_live:
            page(redacted(shown))
            return
        clear()
        say(shown)
        if run.is_finished:
            return
        time.sleep(every_seconds)


def view(
    run: RunRecord, height: int | None = None, in_colour: bool = False, width: int | None = None, bars: str = _BARS
) -> str:
    """What is shown of a run.

    Args:
        height: lines of the terminal; layers that do not fit are left out, and counted. None: as many as it takes.
        width: columns of the terminal; curves are shorter where they would not fit.
        bars: characters of a curve, from the lowest value to the highest.
    """
    length = _CURVE_WIDTH if width is None else max(8, min(_CURVE_WIDTH, width - _BESIDE_CURVE))
    lines = [f"{printable(run.label, 60)}: {run.state}{_silence(run)}", _progress(run), ""]
    rows = []
    for name, title in _CURVES.items():
        if points := run.points(name):
            curve = _curve(points, length, bars).ljust(min(length, run.num_steps_done))
            rows.append((title, curve, number(points[0][1]), "->", number(points[-1][1])))
    lines += [aligned(rows), ""] if rows else ["No step has been logged yet.", ""]
    if run.pattern:
        left = None if height is None else max(1, height - len("\n".join(lines).splitlines()) - 6)
        lines.append(_map(run, left, in_colour))
    return "\n".join(lines)


def _silence(run: RunRecord) -> str:
    """How long a run has written nothing, if long: it evaluates or saves, or has ended, which nobody has written."""
    if run.is_finished:
        return ""
    files = [run.path / name for name in ("config.yaml", "run.json", "metrics.jsonl")]
    quiet = time.time() - max((file.stat().st_mtime for file in files if file.is_file()), default=time.time())
    seconds = run.points("seconds")
    of_steps = _SILENT_STEPS * seconds[-1][1] / run.num_steps_done if seconds and run.num_steps_done else 0.0
    return f", nothing new for {duration(quiet)}" if quiet > max(_SILENT_SECONDS, of_steps) else ""


def _progress(run: RunRecord) -> str:
    done, whole = run.num_steps_done, run.num_steps or run.num_steps_done
    filled = min(30, round(30 * done / whole)) if whole else 0
    seconds = run.points("seconds")
    said = f"[{'#' * filled}{'.' * (30 - filled)}] step {done:,} of {whole:,}"
    if seconds and done:
        said += f", {duration(seconds[-1][1])} so far"
        if done < whole and not run.is_finished:
            said += f", about {duration(seconds[-1][1] / done * (whole - done))} left"
    speed = run.points("tokens_per_second")
    return said + (f", {speed[-1][1]:,.0f} tokens/s" if speed else "")


def _bars_of(encoding: str) -> str:
    try:
        _BARS.encode(encoding)
    except UnicodeEncodeError:
        return _PLAIN_BARS
    return _BARS


def _curve(points: Sequence[Point], length: int, bars: str) -> str:
    """A line of bars, each the mean of its part of the steps; the lowest value is the lowest bar."""
    count = min(length, len(points))
    parts = [points[k * len(points) // count : (k + 1) * len(points) // count] for k in range(count)]
    means = [sum(y for _, y in part) / len(part) for part in parts]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(bars[min(len(bars) - 1, int((mean - low) / span * len(bars)))] for mean in means)


def _map(run: RunRecord, max_layers: int | None, in_colour: bool) -> str:
    layers, columns, cells = rank_grid(run.pattern)
    shown = layers if max_layers is None else layers[:max_layers]
    largest = max(1, *cells.values(), *rank_grid(run.initial_ranks)[2].values())
    rows = [("layer", *(printable(c, 24) for c in columns))]
    for layer in shown:
        ranks = [cells.get((layer, c)) for c in columns]
        rows.append((printable(layer, 40), *("" if r is None else str(r) for r in ranks)))
    text = aligned(rows)
    if in_colour:
        text = _coloured(rows, largest)
    when = f" after the allocation of step {run.allocations[-1].step + 1:,}" if run.allocations else " at the start"
    total = f"{sum(run.pattern.values()):,} of {sum(run.initial_ranks.values()):,} triplets"
    hidden = len(layers) - len(shown)
    more = f"\n... and {hidden} more: --once shows all" if hidden else ""
    return f"Active ranks{when}, {total}\n{text}{more}"


def _coloured(rows: Sequence[Sequence[str]], largest: int) -> str:
    """The same columns as ``aligned`` makes, each rank on its shade."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [aligned(rows).splitlines()[0]]
    for row in rows[1:]:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            colour = _SHADES[shade(int(cell), largest)] if cell else 0
            text = 0 if cell and shade(int(cell), largest) > 6 else 15
            cells.append(f"\x1b[48;5;{colour};38;5;{text}m{cell.rjust(width)}\x1b[0m" if cell else " " * width)
        lines.append("  ".join(cells))
    return "\n".join(lines)
