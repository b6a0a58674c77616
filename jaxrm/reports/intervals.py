"""Shares with their intervals as SVG without a script, e.g. win rates: a dot, and a line from end to end."""

from __future__ import annotations

import html
from dataclasses import dataclass

from jaxrm.reports.charts import COLORS

_ROW, _HEAD = 34, 24  # pixels
_TICKS = (0, 25, 50, 75, 100)


@dataclass(frozen=True)
class Interval:
    """One row of a chart.

    Attributes:
      name: of the row.
      series: what gives it its color, e.g. a judge.
      value: 0 to 1.
      low: lower end; None where there is no interval.
      high: upper end.
    """

    name: str
    series: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Intervals:
    """A chart of shares, from 0 to 100 %.

    Attributes:
      title: heading.
      label: of the scale.
      rows: from top to bottom; those of one name share a line of the chart.
      middle: where a line is drawn, e.g. 0.5 of a win rate; None draws none.
      note: a sentence below the chart.
    """

    title: str
    label: str
    rows: tuple[Interval, ...]
    middle: float | None = None
    note: str = ""


def draw_intervals(chart: Intervals) -> str:
    """Return the chart as HTML with all text escaped."""
    series = list(dict.fromkeys(row.series for row in chart.rows))
    names = list(dict.fromkeys(row.name for row in chart.rows))
    height = _HEAD + _ROW * len(names)
    marks = []
    for tick in _TICKS:
        marks.append(f'<line class="tick" x1="{tick}%" x2="{tick}%" y1="{_HEAD - 4}" y2="{height}"/>')
        marks.append(f'<text class="tick" x="{tick}%" y="{height + 15}">{tick}</text>')
    if chart.middle is not None:
        x = f"{100 * chart.middle:.2f}%"
        marks.append(f'<line class="limit" x1="{x}" x2="{x}" y1="{_HEAD - 4}" y2="{height}"/>')
    for row in chart.rows:
        color = series.index(row.series)
        place = (color + 0.5) / len(series)  # in its line
        y, x = _HEAD + _ROW * (names.index(row.name) + 0.12 + 0.76 * place), f"{100 * row.value:.2f}%"
        text = f"{100 * row.value:.1f} %"
        line = ""
        if row.low is not None and row.high is not None:
            text += f" [{100 * row.low:.1f}, {100 * row.high:.1f}]"
            line = f'<line x1="{100 * row.low:.2f}%" x2="{100 * row.high:.2f}%" y1="{y:.1f}" y2="{y:.1f}"/>'
        tooltip = html.escape(f"{row.name}, {row.series}: {text}")
        dot = f'<circle cx="{x}" cy="{y:.1f}" r="4"/>'
        marks.append(f'<g class="s{color % COLORS}"><title>{tooltip}</title>{line}{dot}</g>')
    keys = "".join(
        f'<li class="key s{number % COLORS}"><i></i><span dir="auto">{html.escape(name)}</span></li>'
        for number, name in enumerate(series)
    )
    listed = "".join(f'<li dir="auto">{html.escape(name)}</li>' for name in names)
    note = f'<p class="note" dir="auto">{html.escape(chart.note)}</p>' if chart.note else ""
    label = html.escape(f"{chart.title}, {chart.label}")
    return (
        f'<figure class="bars intervals card"><figcaption><h3 dir="auto">{html.escape(chart.title)}</h3>'
        f'<span dir="auto">{html.escape(chart.label)}</span></figcaption><ul class="keys">{keys}</ul>'
        f'<div class="rows"><ol>{listed}</ol><svg role="img" aria-label="{label}" height="{height + 22}">'
        f"{''.join(marks)}</svg></div>{note}</figure>"
    )
