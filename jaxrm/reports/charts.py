"""Line charts as SVG that needs no script: sharp at every width, since only the lines stretch."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLORS = 6
POINTS = 1500
_SIDE = 1000  # the lines' own coordinates, stretched over the plot


@dataclass(frozen=True)
class Series:
    """One line of a chart: the points ``(x[i], y[i])``. A y that is None, NaN or infinite is a gap in the line."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]


@dataclass(frozen=True)
class Curves:
    """One chart: its series share the axes, whose labels say the units.

    With `in_order` a line joins its points as they are given, such as along a training whose x comes and goes; else by
    ascending x.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    note: str = ""
    in_order: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with round `ticks`, which lie `step` apart."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float

    def place(self, value: float) -> float:
        """Share of the way from `low` to `high`."""
        return (value - self.low) / (self.high - self.low)


def axis(values: Iterable[float], *, steps: int = 4, whole: bool = True) -> Axis:
    """The axis for finite `values`, cut into about as many `steps`; no values give 0 to 1.

    With `whole` it begins and ends at a tick, and at 0 where the values lie near, but no value just beyond a tick adds
    another; without `whole` it begins and ends at the outermost values.
    """
    held = list(values) or [0.0, 1.0]
    low, high = min(held), max(held)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # all the same
        pad = 0.1 * abs(low) or 1.0
        low, high = low - pad, high + pad
    elif whole and 0 < low < 0.6 * high:
        low = 0.0
    elif whole and 0.6 * low < high < 0:
        high = 0.0
    rough = (high - low) / steps
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(n for n, up_to in ((1, 1.4), (2, 3.2), (5, 7.0), (10, math.inf)) if rough / power <= up_to)
    slack = 0.25 if whole else 1e-6  # of a step; the small one is for rounding
    if whole:
        first, last = math.floor(low / step + slack), math.ceil(high / step - slack)
        low, high = min(low, first * step), max(high, last * step)
    else:
        first, last = math.ceil(low / step - slack), math.floor(high / step + slack)
    return Axis(low, high, tuple(n * step for n in range(first, last + 1)), step)


def number_text(value: float, decimals: int | None) -> str:
    """`value` with that many decimals, or for None in powers of ten with three digits."""
    if decimals is None:
        digits, _, power = f"{value:.2e}".partition("e")
        text = f"{digits}e{int(power)}" if value else "0"
    else:
        text = f"{value:,.{decimals}f}"
        if not float(text.replace(",", "")):
            text = text.lstrip("-")
    return text.replace("-", "−")


def decimals_of(step: float, largest: float) -> int | None:
    """Decimals that tell numbers `step` apart from each other; None where powers of ten are shorter."""
    if largest >= 1e7 or step < 1e-5:
        return None
    return max(0, -math.floor(math.log10(step) + 1e-9))


def slots(curves: Sequence[Curves]) -> dict[str, int]:
    """The place of each series in the palette, by its name over all charts."""
    names = dict.fromkeys(series.name for chart in curves for series in chart.series)
    return {name: place for place, name in enumerate(names)}


def draw_chart(chart: Curves, place: int, slot: Mapping[str, int]) -> tuple[str, dict[str, Any]]:
    """The chart as HTML, all text in it escaped, and what a reader of its values needs, for JSON."""
    lines = [_points(series, in_order=chart.in_order) for series in chart.series]
    across = axis((x for line in lines for x, _ in line), steps=5, whole=False)
    up = axis(y for line in lines for _, y in line if y is not None)
    largest = max(abs(up.low), abs(up.high))
    finer = decimals_of(up.step / 20, largest)
    keys = [
        f'<li><button type="button" class="key {_style(slot[series.name])}" data-slot="{slot[series.name]}" '
        f'aria-pressed="true"><i></i><span dir="auto">{html.escape(series.name)}</span> '
        f"<b>{_last(line, finer)}</b></button></li>"
        for series, line in zip(chart.series, lines, strict=True)
    ]
    paths = [
        f'<path class="{_style(slot[series.name])}" d="{_path(line, across, up)}"/>'
        for series, line in zip(chart.series, lines, strict=True)
    ]
    empty = "" if any(y is not None for line in lines for _, y in line) else '<text x="50%" y="50%">no values</text>'
    label = html.escape(f"{chart.title}: {chart.y_label} by {chart.x_label}")
    note = f'<p class="note" dir="auto">{html.escape(chart.note)}</p>' if chart.note else ""
    figure = (
        f'<figure class="chart" data-chart="{place}"><figcaption><h3 dir="auto">{html.escape(chart.title)}</h3>'
        f'<span dir="auto">{html.escape(chart.y_label)}</span></figcaption><ul class="keys">{"".join(keys)}</ul>'
        f'<div class="plot" tabindex="0" role="group" aria-label="{label}"><svg aria-hidden="true">{_grid(across, up)}'
        f'<svg class="lines" width="100%" height="100%" viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none">'
        f'{"".join(paths)}</svg><g class="cross"></g>{empty}</svg></div>'
        f'<p class="across" dir="auto">{html.escape(chart.x_label)}</p>{note}</figure>'
    )
    data = {
        "x_label": chart.x_label,
        "x": [across.low, across.high],
        "y": [up.low, up.high],
        "decimals": finer,
        "series": [
            {
                "slot": slot[series.name],
                "x": [x for x, _ in line],
                "y": [None if y is None else float(f"{y:.6g}") for _, y in line],
            }
            for series, line in zip(chart.series, lines, strict=True)
        ],
    }
    return figure, data


def _style(slot: int) -> str:
    return f"s{slot % COLORS}" + (" dashed" if slot >= COLORS else "")


def _points(series: Series, *, in_order: bool) -> list[tuple[float, float | None]]:
    """The points by x, or in order; of long series the extremes of each of many stretches, so that peaks stay."""
    assert len(series.x) == len(series.y), (series.name, len(series.x), len(series.y))
    pairs = zip(series.x, series.y, strict=True)
    points = [(float(x), _finite(y)) for x, y in pairs if math.isfinite(x)]
    if not in_order:
        points.sort(key=lambda point: point[0])
    if len(points) <= POINTS:
        return points
    size = -(-len(points) // (POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        held = [(y, n) for n, (_, y) in enumerate(points[start : start + size], start) if y is not None]
        kept += [points[n] for n in sorted({min(held)[1], max(held)[1]})] if held else [points[start]]
    return kept


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _path(line: Iterable[tuple[float, float | None]], across: Axis, up: Axis) -> str:
    """Stretches between the gaps; a point that stands alone is a line of no length, which round ends make a dot."""
    steps, pen_down = [], False
    for x, y in line:
        if y is not None:
            at = f"{_SIDE * across.place(x):.1f} {_SIDE * (1 - up.place(y)):.1f}"
            steps.append(f"L{at}" if pen_down else f"M{at}h0")
        pen_down = y is not None
    return "".join(steps)


def _last(line: Sequence[tuple[float, float | None]], decimals: int | None) -> str:
    values = [y for _, y in line if y is not None]
    return number_text(values[-1], decimals) if values else "–"


def _grid(across: Axis, up: Axis) -> str:
    marks = []
    for axis_, is_up in ((up, True), (across, False)):
        decimals = decimals_of(axis_.step, max(abs(axis_.low), abs(axis_.high)))
        for tick in axis_.ticks:
            at, text = f"{100 * axis_.place(tick):.2f}%", number_text(tick, decimals)
            if is_up:
                at = f"{100 * (1 - axis_.place(tick)):.2f}%"
                base = ' class="base"' if tick == 0 else ""
                marks.append(f'<line{base} x1="0" x2="100%" y1="{at}" y2="{at}"/>')
                marks.append(f'<text class="up" x="-8" y="{at}" dy="0.32em">{text}</text>')
            else:
                marks.append(f'<text x="{at}" y="100%" dy="1.6em">{text}</text>')
    return "".join(marks)
