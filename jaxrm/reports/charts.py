"""Line charts as SVG without a script: sharp at every width, since only the lines stretch."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLORS = 6
POINTS = 1500  # of a line; a longer one is thinned
_SIDE = 1000  # the lines' own coordinates, stretched over the plot


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
      name: of the line, in the key.
      x: ``[N]`` of its points.
      y: ``[N]`` of its points; None, NaN or infinity is a gap in the line.
      summary: text beside its name in the key, e.g. ``mean 41.3``; without it that is the last value.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    summary: str = ""


@dataclass(frozen=True)
class Curves:
    """One chart, whose series share the axes.

    Attributes:
      title: heading.
      x_label: of the horizontal axis, with the unit.
      y_label: of the vertical axis, with the unit.
      series: its lines.
      note: a sentence below the chart.
      in_order: whether a line joins its points in their order, e.g. along a training whose x goes up and down;
        otherwise by ascending x.
      is_scatter: whether its points are dots without lines.
      bin_width: of a histogram of whole numbers, how many of them a bin holds. Each x is then the mean of a bin's
        numbers, and a line is the outline of the bins that are not empty.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    note: str = ""
    in_order: bool = False
    is_scatter: bool = False
    bin_width: int | None = None


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
      low: lower end.
      high: upper end.
      ticks: round numbers between the ends.
      step: distance between two ticks.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float

    def position(self, value: float) -> float:
        """Position of a value: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


def axis(values: Iterable[float], *, steps: int = 4, whole: bool = True) -> Axis:
    """Return an axis for values.

    Args:
      values: that it must cover, all finite; without any it covers 0 to 1.
      steps: about how many there are between ticks.
      whole: True: it begins and ends at a tick, and at 0 where the values lie near 0. A value just beyond a tick adds
        no other tick. False: it begins and ends at the outermost values.
    """
    covered = list(values) or [0.0, 1.0]
    low, high = min(covered), max(covered)
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
    """Return `value` with that many decimals; for None as a power of ten with three digits."""
    if decimals is None:
        digits, _, power = f"{value:.2e}".partition("e")
        text = f"{digits}e{int(power)}" if value else "0"
    else:
        text = f"{value:,.{decimals}f}"
        if not float(text.replace(",", "")):
            text = text.lstrip("-")
    return text.replace("-", "−")


def decimals_for(step: float, largest: float) -> int | None:
    """Return the decimals that distinguish numbers `step` apart; None where powers of ten are shorter."""
    if largest >= 1e7 or step < 1e-5:
        return None
    return max(0, -math.floor(math.log10(step) + 1e-9))


def palette_indices(curves: Sequence[Curves]) -> dict[str, int]:
    """Return the index of each series in the palette, by its name over all charts."""
    names = dict.fromkeys(series.name for chart in curves for series in chart.series)
    return {name: index for index, name in enumerate(names)}


def draw_chart(chart: Curves, number: int, palette: Mapping[str, int]) -> tuple[str, dict[str, Any]]:
    """Draw a chart.

    Args:
      chart: what is drawn.
      number: of the chart on the page, from 0.
      palette: from `palette_indices`.

    Returns:
      The chart as HTML with all text escaped, and the data for the values under the pointer, for JSON.
    """
    lines = [_points(series, in_order=chart.in_order) for series in chart.series]
    reach = (chart.bin_width or 0) / 2
    across = axis((x + side for line in lines for x, _ in line for side in (-reach, reach)), steps=5, whole=False)
    base = [] if chart.bin_width is None else [0.0]
    up = axis([*base, *(y for line in lines for _, y in line if y is not None)])
    decimals = decimals_for(up.step / 20, max(abs(up.low), abs(up.high)))
    data = {
        "x_label": chart.x_label,
        "x": [across.low, across.high],
        "y": [up.low, up.high],
        "decimals": decimals,
        "series": [
            {
                "slot": palette[series.name],
                "x": [x for x, _ in line],
                "y": [None if y is None else float(f"{y:.6g}") for _, y in line],
            }
            for series, line in zip(chart.series, lines, strict=True)
        ],
    }
    if chart.bin_width is not None:
        data["bin"] = chart.bin_width
    keys = [
        _key(series.name, palette[series.name], html.escape(series.summary) or _last_value(line, decimals))
        for series, line in zip(chart.series, lines, strict=True)
    ]
    shapes = [
        _path(line, across, up, chart.is_scatter) if chart.bin_width is None else _outline(line, across, up, reach)
        for line in lines
    ]
    paths = [
        f'<path class="{_style(palette[series.name])}" d="{shape}"/>'
        for series, shape in zip(chart.series, shapes, strict=True)
    ]
    is_empty = all(y is None for line in lines for _, y in line)
    plot = (
        _grid(across, up)
        + _lines(paths, chart.is_scatter)
        + ('<text x="50%" y="50%">no values</text>' if is_empty else "")
    )
    return _figure(chart, number, "".join(keys), plot), data


def _figure(chart: Curves, number: int, keys: str, plot: str) -> str:
    label = html.escape(f"{chart.title}: {chart.y_label} by {chart.x_label}")
    note = f'<p class="note" dir="auto">{html.escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart" data-chart="{number}"><figcaption><h3 dir="auto">{html.escape(chart.title)}</h3>'
        f'<span dir="auto">{html.escape(chart.y_label)}</span></figcaption><ul class="keys">{keys}</ul>'
        f'<div class="plot" tabindex="0" role="group" aria-label="{label}"><svg aria-hidden="true">{plot}</svg></div>'
        f'<p class="across" dir="auto">{html.escape(chart.x_label)}</p>{note}</figure>'
    )


def _key(name: str, color: int, value: str) -> str:
    return (
        f'<li><button type="button" class="key {_style(color)}" data-slot="{color}" '
        f'aria-pressed="true"><i></i><span dir="auto">{html.escape(name)}</span> <b>{value}</b></button></li>'
    )


def _lines(paths: Sequence[str], is_scatter: bool) -> str:
    name = "lines dots" if is_scatter else "lines"
    return (
        f'<svg class="{name}" width="100%" height="100%" viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none">'
        f'{"".join(paths)}</svg><g class="cross"></g>'
    )


def _style(color: int) -> str:
    return f"s{color % COLORS}" + (" dashed" if color >= COLORS else "")


def _points(series: Series, *, in_order: bool) -> list[tuple[float, float | None]]:
    """The points by x, or in their order. A long series keeps the extremes of each of many stretches, so peaks stay."""
    assert len(series.x) == len(series.y), (series.name, len(series.x), len(series.y))
    pairs = zip(series.x, series.y, strict=True)
    points = [(float(x), _finite(y)) for x, y in pairs if math.isfinite(x)]
    if not in_order:
        points.sort(key=lambda point: point[0])
    if len(points) <= POINTS:
        return points
    size = -(-len(points) // (POINTS // 2))
    thinned = []
    for start in range(0, len(points), size):
        finite = [(y, n) for n, (_, y) in enumerate(points[start : start + size], start) if y is not None]
        thinned += [points[n] for n in sorted({min(finite)[1], max(finite)[1]})] if finite else [points[start]]
    return thinned


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _path(line: Iterable[tuple[float, float | None]], across: Axis, up: Axis, is_scatter: bool) -> str:
    """Path data: a stretch between each two gaps. Round ends make a dot of a lone point, a line of length 0."""
    steps, pen_down = [], False
    for x, y in line:
        if y is not None:
            point = f"{_SIDE * across.position(x):.1f} {_SIDE * (1 - up.position(y)):.1f}"
            steps.append(f"L{point}" if pen_down else f"M{point}h0")
        pen_down = y is not None and not is_scatter
    return "".join(steps)


def _outline(line: Iterable[tuple[float, float | None]], across: Axis, up: Axis, reach: float) -> str:
    """Path data: an outline around each run of bins that are not empty, from the base and back to it."""
    steps, base, is_open, end = [], f"V{_SIDE * (1 - up.position(0)):.1f}", False, 0.0
    for x, y in line:
        left, right = (_SIDE * across.position(x + side) for side in (-reach, reach))
        if is_open and (not y or left - end > 0.5):
            steps.append(base)
            is_open = False
        if y:
            steps.append("" if is_open else f"M{left:.1f} {base[1:]}")
            steps.append(f"V{_SIDE * (1 - up.position(y)):.1f}H{right:.1f}")
            is_open, end = True, right
    return "".join(steps) + (base if is_open else "")


def _last_value(line: Sequence[tuple[float, float | None]], decimals: int | None) -> str:
    values = [y for _, y in line if y is not None]
    return number_text(values[-1], decimals) if values else "–"


def _grid(across: Axis, up: Axis) -> str:
    marks = []
    for axis_, is_up in ((up, True), (across, False)):
        decimals = decimals_for(axis_.step, max(abs(axis_.low), abs(axis_.high)))
        for tick in axis_.ticks:
            text = number_text(tick, decimals)
            if is_up:
                y = f"{100 * (1 - axis_.position(tick)):.2f}%"
                base = ' class="base"' if tick == 0 else ""
                marks.append(f'<line{base} x1="0" x2="100%" y1="{y}" y2="{y}"/>')
                marks.append(f'<text class="up" x="-8" y="{y}" dy="0.32em">{text}</text>')
            else:
                x = f"{100 * axis_.position(tick):.2f}%"
                marks.append(f'<text x="{x}" y="100%" dy="1.6em">{text}</text>')
    return "".join(marks)
