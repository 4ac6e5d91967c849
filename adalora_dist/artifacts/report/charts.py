"""Curves as SVG, drawn here and not by a script: they are there in any browser, and a table behind each says the same.

Colours are the page's (``--c0`` to ``--c7``), so that they suit light and dark; dashes tell runs apart without them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from adalora_dist.artifacts.report.markup import folded, mean_and_sd, moments, number, said, table
from adalora_dist.artifacts.report.runs import Point

NUM_COLOURS = 8
_DASHES = ("", "7 3", "2 2", "9 3 2 3")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 260, 64, 12, 10, 34
_CURVE_POINTS, _ALL_POINTS, _BAND_POINTS = 300, 1600, 80
"""Of a curve, of those of a chart together, of a band; longer curves are averaged over neighbouring steps."""
_TABLE_ROWS = 12


@dataclass(frozen=True)
class Curve:
    """A metric of one run over its steps."""

    label: str
    points: Sequence[Point]
    run: int
    """Position of the run among those of the report, for its colour."""
    dash: str = ""


def chart(title: str, unit: str, curves: Sequence[Curve], steps_at_once: bool = False, end: float = 0) -> str:
    """A figure with the curves that have points, a legend and a table; "" if none has.

    Args:
        unit: of the values, for the axis and the table.
        steps_at_once: values hold until the next point (budgets), instead of changing steadily.
        end: the step that the axis reaches at least, so that the charts of a page can be compared.
    """
    shown = [curve for curve in curves if curve.points]
    if not shown:
        return ""
    limit = max(40, min(_CURVE_POINTS, _ALL_POINTS // len(shown)))
    # A budget is not averaged: its steps would become slopes.
    thinned = [Curve(c.label, (_picked if steps_at_once else _averaged)(c.points, limit), c.run, c.dash) for c in shown]
    axes = _Axes.around([p for c in thinned for p in c.points], end, from_zero=steps_at_once)
    parts = [axes.drawn()]
    several_runs = 1 < len({c.run for c in thinned}) == len(thinned)
    for curve in thinned:
        dash = curve.dash or _DASHES[curve.run // NUM_COLOURS % len(_DASHES)]
        colour = f'style="stroke:var(--c{curve.run % NUM_COLOURS})"' + (f' stroke-dasharray="{dash}"' if dash else "")
        if len(curve.points) == 1:
            (x, y), fill = axes.place(*curve.points[0]), f'style="fill:var(--c{curve.run % NUM_COLOURS})"'
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" {fill}/>')
        parts.append(f'<path class="curve" d="{axes.path(curve.points, steps_at_once)}" {colour}/>')
    if several_runs:
        parts.append(axes.mean_and_band([c.points for c in thinned], steps_at_once))
    summary = "; ".join(
        f"{said(c.label)} from {number(c.points[0][1])} to {number(c.points[-1][1])}" for c in shown[:12]
    )
    in_unit = f"{title}, {unit}" if unit else title
    drawn = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{said(in_unit)} over steps: {summary}">'
        + "".join(parts) + "</svg>"
    )  # fmt: skip
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 28 8" aria-hidden="true"><path class="curve" d="M0 4H28" '
        f'style="stroke:var(--c{c.run % NUM_COLOURS})" '
        f'stroke-dasharray="{c.dash or _DASHES[c.run // NUM_COLOURS % len(_DASHES)]}"/></svg>{said(c.label, 60)}</li>'
        for c in thinned
    )
    band = '<li><span class="key band" aria-hidden="true"></span>mean ± sd of the runs</li>' if several_runs else ""
    told = f'<ul class="legend">{legend}{band}</ul>' if len(thinned) > 1 else ""
    return (
        f'<figure><figcaption>{said(in_unit)}</figcaption>{drawn}{told}'
        + folded("as a table", _table(in_unit, shown, steps_at_once)) + "</figure>"
    )  # fmt: skip


def _table(title: str, curves: Sequence[Curve], steps_at_once: bool) -> str:
    steps = sorted({int(x) for c in curves for x, _ in c.points})
    shown = [steps[k] for k in sorted({round(i * (len(steps) - 1) / (_TABLE_ROWS - 1)) for i in range(_TABLE_ROWS)})]
    rows = []
    for step in shown:
        values = [value_at(c.points, step, exactly=not steps_at_once) for c in curves]
        known = [v for v in values if v is not None]
        spread = [mean_and_sd(known) if len(known) > 1 else "–"] if len(curves) > 1 else []
        rows.append([f"step {step:,}", *map(number, values), *spread])
    head = ["", *(said(c.label, 60) for c in curves), *(["mean ± sd"] if len(curves) > 1 else [])]
    return table(said(title), head, rows)


def value_at(points: Sequence[Point], step: float, exactly: bool) -> float | None:
    """Of the last point up to ``step``; None before the first, behind the last, or ``exactly``: at no point."""
    index = bisect_right(points, (step, math.inf)) - 1
    if index < 0 or (exactly and points[index][0] != step) or (step > points[-1][0]):
        return None
    return points[index][1]


def _between(points: Sequence[Point], step: float, steps_at_once: bool) -> float:
    """The curve at a step from its first to its last."""
    index = max(0, bisect_right(points, (step, math.inf)) - 1)
    (x, y), (next_x, next_y) = points[index], points[min(index + 1, len(points) - 1)]
    return y if steps_at_once or next_x == x else y + (next_y - y) * (step - x) / (next_x - x)


def _averaged(points: Sequence[Point], limit: int) -> list[Point]:
    """At most ``limit`` points, each the mean of its neighbours; first and last stay as they are."""
    if len(points) <= limit:
        return list(points)
    inner, made = points[1:-1], []
    for k in range(limit - 2):
        part = inner[k * len(inner) // (limit - 2) : (k + 1) * len(inner) // (limit - 2)]
        if part:
            made.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [points[0], *made, points[-1]]


def _picked(points: Sequence[Point], limit: int) -> list[Point]:
    """Where the value changes, evenly thinned to at most ``limit`` points, and the last point."""
    changes = [p for k, p in enumerate(points) if k == 0 or p[1] != points[k - 1][1]]
    step = -(-len(changes) // limit)
    return [*changes[:-1:step], changes[-1], points[-1]]


@dataclass(frozen=True)
class _Axes:
    """From steps and values to places in the picture."""

    x_ticks: list[float]
    y_ticks: list[float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    @classmethod
    def around(cls, points: Sequence[Point], end: float, from_zero: bool) -> _Axes:
        last, ys = max([end, *(x for x, _ in points)]), [y for _, y in points]
        low, high = (min(0.0, *ys) if from_zero else min(ys)), max(ys)
        y_ticks = _ticks(low, high)
        return cls(
            [t for t in _ticks(0, last) if t <= last], y_ticks, (0, last),
            (min(low, y_ticks[0]), max(high, y_ticks[-1])),
        )  # fmt: skip

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x_range[0]) / ((self.x_range[1] - self.x_range[0]) or 1)
        up = (y - self.y_range[0]) / ((self.y_range[1] - self.y_range[0]) or 1)
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return round(_LEFT + across * width, 1), round(_TOP + (1 - up) * height, 1)

    def path(self, points: Sequence[Point], steps_at_once: bool) -> str:
        words: list[str] = []
        for x, y in (self.place(*point) for point in points):
            if words and steps_at_once:
                words.append(f"H{x:g}V{y:g}")
            else:
                words.append(f"{'L' if words else 'M'}{x:g} {y:g}")
        return "".join(words)

    def mean_and_band(self, curves: Sequence[Sequence[Point]], steps_at_once: bool) -> str:
        """Mean ± sd of the runs, over the steps that all of them have."""
        first, last = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
        steps = [first + (last - first) * k / (_BAND_POINTS - 1) for k in range(_BAND_POINTS)] if first < last else []
        upper, lower, middle = [], [], []
        for step in steps:
            mean, sd = moments([_between(points, step, steps_at_once) for points in curves])
            middle.append((step, mean))
            upper.append(self.place(step, min(mean + sd, self.y_range[1])))
            lower.append(self.place(step, max(mean - sd, self.y_range[0])))
        if len(upper) < 2:
            return ""
        corners = " ".join(f"{x:g},{y:g}" for x, y in [*upper, *reversed(lower)])
        return f'<polygon class="band" points="{corners}"/><path class="curve mean" d="{self.path(middle, False)}"/>'

    def drawn(self) -> str:
        parts = []
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for tick in self.y_ticks:
            y = self.place(self.x_range[0], tick)[1]
            parts.append(f'<path class="grid" d="M{_LEFT} {y:g}H{right}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:g}" text-anchor="end">{short(tick)}</text>')
        for tick in self.x_ticks:
            x = self.place(tick, self.y_range[0])[0]
            anchor = "end" if x > right - 16 else "middle"
            parts.append(f'<text x="{x:g}" y="{bottom + 16}" text-anchor="{anchor}">{short(tick)}</text>')
        parts.append(f'<text x="{(_LEFT + right) / 2:g}" y="{_HEIGHT - 3}" text-anchor="middle">step</text>')
        return f'<g aria-hidden="true">{"".join(parts)}</g>'


def short(value: float) -> str:
    """A tick's number: 1,500 or 120k or 3e-05."""
    if abs(value) >= 1e12:
        return f"{value:.2g}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e5:
        return f"{value / 1e3:g}k"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about ``count`` of them."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, but for rounding
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 12) if step > 1e-9 else k * step for k in range(first, last + 1)]
