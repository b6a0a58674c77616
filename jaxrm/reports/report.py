"""A report: one self-contained HTML file with tables, curves over training and example responses."""

from __future__ import annotations

import html
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from jaxrm import atomic
from jaxrm.reports.bars import Bar, Bars, draw_bars
from jaxrm.reports.charts import Curves, Series, draw_chart, number_text, palette_indices
from jaxrm.reports.document import fill_template, read_template, rounded
from jaxrm.reports.intervals import Interval, Intervals, draw_intervals

__all__ = [
    "Bar",
    "Bars",
    "Curves",
    "ExampleResponse",
    "Interval",
    "Intervals",
    "ReportExample",
    "Series",
    "Shaded",
    "SourceRewards",
    "Table",
    "write_report",
]


@dataclass(frozen=True)
class Shaded:
    """A cell with a colored background, as in a matrix of win rates.

    Attributes:
      text: of the cell.
      shade: −1 to 1, from full orange over none to full blue.
      strong: whether the text is bold, e.g. where an interval leaves out chance.
    """

    text: str
    shade: float
    strong: bool = False

    def __str__(self) -> str:
        return self.text


Cell = str | float | int | Shaded | None


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
      title: heading.
      columns: names of the columns; the first one names the rows.
      rows: cells row by row, as many as there are columns. The numbers of a column get the same decimals; None and
        NaN are shown as missing. A `Shaded` cell keeps its color, but not in the first column.
      note: a sentence below the table.
      is_folded: whether only its heading is seen until a reader opens it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    is_folded: bool = False


@dataclass(frozen=True)
class SourceRewards:
    """What one source of a sum of rewards gave a response.

    Attributes:
      name: of the source.
      weight: in the sum.
      reward: sum over the response, before the weight.
      rewards: one a token, before the weight.
    """

    name: str
    weight: float
    reward: float
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class ExampleResponse:
    """The response of one policy.

    Attributes:
      name: the policy, e.g. "sft" or "ppo, step 60".
      text: the response.
      tokens: its tokens as text, in order; without them the text is shown uncolored.
      rewards: one reward a token, on one color scale for the whole report; without them the tokens are uncolored.
      facts: ``(name, value)`` pairs next to the name, e.g. ``("reward", "3.10")``.
      sources: of a sum of rewards, each shown as a row of tokens of its own.
    """

    name: str
    text: str
    tokens: tuple[str, ...] = ()
    rewards: tuple[float | None, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    sources: tuple[SourceRewards, ...] = ()


@dataclass(frozen=True)
class ReportExample:
    """A prompt with the responses to compare.

    Attributes:
      prompt: as one text.
      responses: to it.
      tags: by which a reader may choose, e.g. ``judges disagree``.
    """

    prompt: str
    responses: tuple[ExampleResponse, ...]
    tags: tuple[str, ...] = ()


def write_report(
    path: str | Path,
    *,
    title: str,
    about: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    curves: Sequence[Curves],
    examples: Sequence[ReportExample],
    bars: Sequence[Bars] = (),
    intervals: Sequence[Intervals] = (),
    more_tables: Sequence[Table] = (),
) -> None:
    """Write the report, atomically: bars, tables, intervals, curves as small multiples, then examples one at a time.

    Tables and charts are HTML and SVG in the file. Its script adds the values under the pointer and the examples. The
    file needs no network and no other file. Every text is escaped or reaches the browser as JSON. The page's
    Content-Security-Policy runs no other script and loads nothing, whatever a text says.

    Args:
      path: the HTML file; missing folders are made, and an existing file is replaced.
      title: heading of the report.
      about: ``(name, value)`` lines below the heading, e.g. the run's folder.
      tables: results, the most important first.
      curves: charts. A series has the same color in all charts, by its name. Charts with the same `x_label` show their
        values at the same x under the pointer.
      examples: prompts with responses to compare.
      bars: charts of stacked bars.
      intervals: charts of shares with their intervals.
      more_tables: tables below the curves, of what few readers look up.
    """
    palette = palette_indices(curves)
    charts = [draw_chart(chart, number, palette) for number, chart in enumerate(curves)]
    figures = "".join(figure for figure, _ in charts)
    report = fill_template(
        read_template("report.html"),
        title=title,
        style=read_template("page.css") + read_template("report.css"),
        script=read_template("page_tokens.js") + read_template("report.js"),
        content={"charts": [data for _, data in charts], "examples": [_example(example) for example in examples]},
        about=_about(about),
        bars=_section("bars", "Bars", "".join(draw_bars(chart) for chart in bars)),
        tables=_section("tables", "Results", "".join(_table(table) for table in tables)),
        intervals=_section("intervals", "Shares", "".join(draw_intervals(chart) for chart in intervals)),
        curves=_section("curves", "Curves", f'<h2>Curves</h2><div class="charts">{figures}</div>' if figures else ""),
        more=_section("more", "More results", "".join(_table(table) for table in more_tables)),
        examples=_section("examples", "Examples", read_template("report_examples.html")) if examples else "",
    )
    atomic.write_text(Path(path), report)


def _section(name: str, label: str, content: str) -> str:
    return f'<section id="{name}" aria-label="{label}">{content}</section>' if content else ""


def _about(lines: Sequence[tuple[str, str]]) -> str:
    rows = [
        f'<div><dt dir="auto">{html.escape(name)}</dt><dd dir="auto">{html.escape(value)}</dd></div>'
        for name, value in lines
    ]
    return f'<dl id="about">{"".join(rows)}</dl>' if rows else ""


def _table(table: Table) -> str:
    for row in table.rows:
        assert len(row) == len(table.columns), (table.title, table.columns, row)
    columns = [_column_texts([row[index] for row in table.rows]) for index in range(len(table.columns))]
    kinds = [""] + [_column_class(column) for column in columns[1:]]
    head = "".join(
        f'<th scope="col"{kind} dir="auto">{html.escape(name)}</th>'
        for kind, name in zip(kinds, table.columns, strict=True)
    )
    body = []
    for row, texts in zip(table.rows, zip(*columns, strict=True), strict=True):
        cells = [
            f'<td{kind}><span class="missing">–</span></td>'
            if text is None
            else f'<td{_shaded(cell, kind)} dir="auto">{html.escape(text)}</td>'
            for cell, kind, text in zip(row[1:], kinds[1:], texts[1:], strict=True)
        ]
        body.append(f'<tr><th scope="row" dir="auto">{html.escape(texts[0] or "–")}</th>{"".join(cells)}</tr>')
    note = f'<p class="note" dir="auto">{html.escape(table.note)}</p>' if table.note else ""
    heading = f'<h2 dir="auto">{html.escape(table.title)}</h2>'
    outer, heading = ("details", f"<summary>{heading}</summary>") if table.is_folded else ("section", heading)
    return (
        f'<{outer} class="result">{heading}<div class="card scroll" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}</{outer}>"
    )


def _shaded(cell: Cell, kind: str) -> str:
    """The class of a cell: that of its column and one of nine shades, as the page's policy allows no styles here."""
    if not isinstance(cell, Shaded):
        return kind
    level = round(4 * min(max(cell.shade, -1.0), 1.0))
    names = [*re.findall(r'class="(\w+)"', kind), f"{'m' if level < 0 else 'p'}{abs(level)}"]
    return f' class="{" ".join(names + ["strong"] * cell.strong)}"'


def _column_texts(cells: Sequence[Cell]) -> list[str | None]:
    """The cells of a column as text; None for an empty cell."""
    sizes = [abs(float(cell)) for cell in cells if _is_number(cell) and not isinstance(cell, numbers.Integral)]
    sizes = [size for size in sizes if 0 < size < math.inf]
    # Three digits of the largest number, so that a column of shares shows 0.812 and one of lengths 63.4.
    decimals: int | None = min(4, max(0, 2 - math.floor(math.log10(max(sizes))))) if sizes else 0
    if sizes and not 1e-3 <= max(sizes) < 1e7:
        decimals = None
    return [_cell_text(cell, decimals) for cell in cells]


def _cell_text(cell: Cell, decimals: int | None) -> str | None:
    if cell is None or cell == "":
        return None
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if not _is_number(cell):
        return str(cell)
    if isinstance(cell, numbers.Integral):
        return number_text(int(cell), 0)
    value = float(cell)
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounds_to_zero = decimals is not None and value and abs(value) < 0.5 * 10.0**-decimals
    return number_text(value, None if rounds_to_zero else decimals)


def _is_number(cell: Cell) -> TypeGuard[int | float]:
    return isinstance(cell, numbers.Real) and not isinstance(cell, bool)


def _column_class(column: Sequence[str | None]) -> str:
    """CSS class of a column: numbers, also with a unit or an interval, are right-aligned; sentences may wrap."""
    texts = [text for text in column if text is not None]
    if texts and all(re.match(r"[−+±<>≤≥~-]?\s?(\d|∞)", text) for text in texts):
        return ' class="n"'
    return ' class="wide"' if any(len(text) > 48 for text in texts) else ""


def _example(example: ReportExample) -> dict[str, Any]:
    responses = [_response(response) for response in example.responses]
    return {"prompt": example.prompt, "responses": responses, "tags": list(example.tags)}


def _response(response: ExampleResponse) -> dict[str, Any]:
    assert not response.rewards or len(response.rewards) == len(response.tokens), (response.name, response.text)
    shown: dict[str, Any] = {
        "name": response.name,
        "text": response.text,
        "tokens": list(response.tokens),
        "rewards": _rounded(response.rewards),
        "facts": [list(fact) for fact in response.facts],
    }
    if response.sources:
        shown["sources"] = {
            source.name: {
                "weight": source.weight,
                "reward": source.reward if math.isfinite(source.reward) else None,
                "rewards": _rounded(source.rewards),
            }
            for source in response.sources
        }
    return shown


def _rounded(rewards: Sequence[float | None]) -> list[float | None]:
    """As a page shows them; None for what is no finite number."""
    return [rounded(reward) if reward is not None and math.isfinite(reward) else None for reward in rewards]
