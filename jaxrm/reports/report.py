"""A report: one self-contained HTML file with tables, curves over training and example responses."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.reports.bars import Bar, Bars, draw_bars
from jaxrm.reports.charts import Curves, Series, draw_chart, palette_indices
from jaxrm.reports.document import fill_template, read_template, rounded
from jaxrm.reports.intervals import Interval, Intervals, draw_intervals
from jaxrm.reports.tables import Cell, Shaded, Table, draw_table

__all__ = [
    "Bar",
    "Bars",
    "Cell",
    "Curves",
    "ExampleResponse",
    "Interval",
    "Intervals",
    "Report",
    "ReportExample",
    "Series",
    "Shaded",
    "SourceRewards",
    "Table",
    "write_report",
]


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


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows, in this order; an empty part leaves no trace on the page.

    Attributes:
      title: heading of the report.
      about: ``(name, value)`` lines below the heading, e.g. the run's folder.
      bars: charts of stacked bars.
      tables: results, the most important first.
      intervals: charts of shares with their intervals.
      curves: charts as small multiples. A series has the same color in all charts, by its name. Charts with the same
        `x_label` show their values at the same x under the pointer.
      curves_heading: above these.
      more_tables: what few readers look up.
      examples: prompts with responses to compare, one at a time.
    """

    title: str
    about: Sequence[tuple[str, str]] = ()
    bars: Sequence[Bars] = ()
    tables: Sequence[Table] = ()
    intervals: Sequence[Intervals] = ()
    curves: Sequence[Curves] = ()
    curves_heading: str = "Curves"
    more_tables: Sequence[Table] = ()
    examples: Sequence[ReportExample] = ()


def write_report(path: str | Path, report: Report) -> None:
    """Write a report, atomically.

    Tables and charts are HTML and SVG in the file. Its script adds the values under the pointer and the examples. The
    file needs no network and no other file. Every text is escaped or reaches the browser as JSON. The page's
    Content-Security-Policy runs no other script and loads nothing, whatever a text says.

    Args:
      path: the HTML file; missing folders are made, and an existing file is replaced.
      report: what the file shows.
    """
    palette = palette_indices(report.curves)
    charts = [draw_chart(chart, number, palette) for number, chart in enumerate(report.curves)]
    figures = "".join(figure for figure, _ in charts)
    page = fill_template(
        read_template("report.html"),
        title=report.title,
        style=read_template("page.css") + read_template("report.css"),
        script=read_template("page_tokens.js") + read_template("report.js"),
        content={"charts": [data for _, data in charts], "examples": [_example(each) for each in report.examples]},
        about=_about(report.about),
        bars=_section("bars", "Bars", "".join(draw_bars(chart) for chart in report.bars)),
        tables=_section("tables", "Results", "".join(draw_table(table) for table in report.tables)),
        intervals=_section("intervals", "Shares", "".join(draw_intervals(chart) for chart in report.intervals)),
        curves=_section("curves", report.curves_heading, _curves(report.curves_heading, figures)),
        more=_section("more", "More results", "".join(draw_table(table) for table in report.more_tables)),
        examples=_section("examples", "Examples", read_template("report_examples.html")) if report.examples else "",
    )
    atomic.write_text(Path(path), page)


def _section(name: str, label: str, content: str) -> str:
    return f'<section id="{name}" aria-label="{html.escape(label)}">{content}</section>' if content else ""


def _curves(heading: str, figures: str) -> str:
    return f'<h2>{html.escape(heading)}</h2><div class="charts">{figures}</div>' if figures else ""


def _about(lines: Sequence[tuple[str, str]]) -> str:
    rows = [
        f'<div><dt dir="auto">{html.escape(name)}</dt><dd dir="auto">{html.escape(value)}</dd></div>'
        for name, value in lines
    ]
    return f'<dl id="about">{"".join(rows)}</dl>' if rows else ""


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
