"""Stacked bars as SVG without a script, e.g. memory by use."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxrm.reports.charts import COLORS, axis, decimals_for, number_text

_ROW, _HEAD = 30, 26  # pixels


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
      name: of the bar.
      parts: sizes by name, in the order in which they are stacked.
    """

    name: str
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Bars:
    """One chart of bars that share a scale.

    Attributes:
      title: heading.
      label: of the scale, with the unit.
      bars: from top to bottom.
      limit: where a line is drawn, e.g. the memory of a device; None draws none.
      limit_name: label of that line.
      note: a sentence below the chart.
    """

    title: str
    label: str
    bars: tuple[Bar, ...]
    limit: float | None = None
    limit_name: str = ""
    note: str = ""


def draw_bars(chart: Bars) -> str:
    """Return the bars as HTML with all text escaped; the total of a bar is written at its end."""
    names = list(dict.fromkeys(name for bar in chart.bars for name in bar.parts))
    sums = [sum(bar.parts.values()) for bar in chart.bars]
    across = axis([0.0, *sums, *([chart.limit] if chart.limit is not None else [])], steps=6)
    decimals = decimals_for(across.step / 20, across.high)
    keys = "".join(
        f'<li class="key {_color(names, name)}"><i></i><span>{html.escape(name)}</span></li>' for name in names
    )
    height = _HEAD + _ROW * len(chart.bars)
    marks = _ticks(across.ticks, across.high, height)
    for index, (bar, total) in enumerate(zip(chart.bars, sums, strict=True)):
        top, start = _HEAD + _ROW * index, 0.0
        for name, size in bar.parts.items():
            tooltip = html.escape(f"{name}: {number_text(size, decimals)}")
            marks.append(
                f'<rect class="{_color(names, name)}" x="{100 * start / across.high:.3f}%" y="{top + 6}" '
                f'width="{100 * size / across.high:.3f}%" height="{_ROW - 12}"><title>{tooltip}</title></rect>'
            )
            start += size
        inside, end = total > 0.8 * across.high, 100 * total / across.high
        marks.append(
            f'<text class="total{" inside" if inside else ""}" x="{end:.3f}%" y="{top + _ROW / 2}" '
            f'dx="{-6 if inside else 6}" dy="0.34em">{number_text(total, decimals)}</text>'
        )
    if chart.limit is not None:
        x = f"{100 * chart.limit / across.high:.3f}%"
        limit_text = html.escape(f"{chart.limit_name} {number_text(chart.limit, decimals)}")
        marks.append(f'<line class="limit" x1="{x}" x2="{x}" y1="16" y2="{height}"/>')
        marks.append(f'<text class="limit" x="{x}" y="11" dx="-2">{limit_text}</text>')
    rows = "".join(f'<li dir="auto">{html.escape(bar.name)}</li>' for bar in chart.bars)
    note = f'<p class="note" dir="auto">{html.escape(chart.note)}</p>' if chart.note else ""
    label = html.escape(f"{chart.title}, {chart.label}")
    return (
        f'<figure class="bars card"><figcaption><h3 dir="auto">{html.escape(chart.title)}</h3>'
        f'<span dir="auto">{html.escape(chart.label)}</span></figcaption><ul class="keys">{keys}</ul>'
        f'<div class="rows"><ol>{rows}</ol><svg role="img" aria-label="{label}" height="{height + 22}">'
        f"{''.join(marks)}</svg></div>{note}</figure>"
    )


def _color(names: Sequence[str], name: str) -> str:
    return f"s{names.index(name) % COLORS}"


def _ticks(ticks: Sequence[float], high: float, height: int) -> list[str]:
    decimals = decimals_for(ticks[1] - ticks[0], high) if len(ticks) > 1 else 0
    marks = []
    for tick in ticks:
        x = f"{100 * tick / high:.3f}%"
        marks.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{_HEAD}" y2="{height}"/>')
        marks.append(f'<text class="tick" x="{x}" y="{height + 15}">{number_text(tick, decimals)}</text>')
    return marks
