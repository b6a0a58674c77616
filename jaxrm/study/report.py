"""Tables of a study on the console, ``results/`` and ``report.html`` in its folder."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.reports.report import ExampleResponse, Report, ReportExample, Table, write_report
from jaxrm.runtime.metrics import json_line
from jaxrm.runtime.progress import format_seconds, format_value, print_table
from jaxrm.study.arms import in_order
from jaxrm.study.charts import curve_charts, win_rate_charts
from jaxrm.study.collect import Progress, collect
from jaxrm.study.config import Study
from jaxrm.study.curves import equal_kl_tables, training_table
from jaxrm.study.mechanism import write_mechanism
from jaxrm.study.readings import SINGLE, read
from jaxrm.study.results import SPLIT_NAMES, Results
from jaxrm.study.tables import (
    adjusted_tables,
    agreement_table,
    behavior_tables,
    bias_tables,
    blind_table,
    choices_table,
    failed_table,
    missing_table,
    settings_tables,
    win_rate_tables,
)
from jaxrm.study.win_rates import ArmWinRate, win_rates
from jaxrm.study.worlds import worlds_of

CONSOLE_WIDTH = 110
_FIRST_COLUMN = 34  # most characters of a name in the first column
_QUESTION = "Which reward, with which settings, and what happens if they are wrong?"


def publish(study: Study, folder: Path, progress: Progress) -> None:
    """Print the tables of a study, and write its results and its pages.

    Args:
      study: from `jaxrm.study.presets.apply_preset`.
      folder: of the study, which may be unfinished.
      progress: how far it is.

    Raises:
      UserError: two arms have answers to different prompts.
    """
    results = collect(study, folder, progress)
    about = [
        ("Folder", str(folder)),
        ("Preset", study.preset),
        ("Worlds", ", ".join(worlds_of(study))),
        ("Policy", str(study.size)),
        ("Seeds", f"{len(study.seeds or ())}, each with its own SFT policy, pairs and reward models"),
        ("Time of all runs", format_seconds(progress.seconds)),
    ]
    rates = win_rates(results)
    write_tables(results, rates, folder, about)
    write_mechanism(study, results, folder, progress.done)
    print(f"The report is {folder / 'report.html'}", flush=True)


def write_tables(results: Results, rates: Sequence[ArmWinRate], folder: Path, about: Sequence[tuple[str, str]]) -> None:
    """Print the tables, and write ``results/`` and ``report.html``.

    Args:
      results: of the study so far.
      rates: its win rates.
      folder: of the study.
      about: ``(name, value)`` lines below the report's heading.
    """
    tables = [
        *bias_tables(results),
        *win_rate_tables(results, rates),
        *settings_tables(results),
        *behavior_tables(results, "published"),
        *training_table(results),
        *agreement_table(results),
        *adjusted_tables(rates),
        *blind_table(results),
        *choices_table(results),
        *(table for protocol in ("blind", "oracle") for table in behavior_tables(results, protocol)),
        *equal_kl_tables(results),
        *missing_table(results),
    ]
    tables.sort(key=lambda table: table.is_folded)  # which leaves the others in their order
    for table in tables:
        if not table.is_folded:
            _print(table)
    if not tables:
        print("There are no results yet.")
    _write_rows(folder / "results", results, rates)
    page = Report(
        title=_QUESTION,
        about=about,
        tables=[*(table for table in tables if not table.is_folded), *failed_table(results)],
        more_tables=[table for table in tables if table.is_folded],
        curves=curve_charts(results),
        examples=_examples(results),
        intervals=win_rate_charts(results, rates),
    )
    write_report(folder / "report.html", page)


def _write_rows(folder: Path, results: Results, rates: Sequence[ArmWinRate]) -> None:
    files = {
        "policies": _policy_rows(results),
        "curves": _curve_rows(results),
        "choices": _choice_rows(results),
        "agreement": results.agreement,
        "win_rates": (rate.as_row() for rate in rates),
    }
    for name, rows in files.items():
        atomic.write_text(folder / f"{name}.jsonl", "".join(json_line(row) for row in rows))


def _policy_rows(results: Results) -> Iterable[dict[str, Any]]:
    for key, policy in results.policies.items():
        yield {**key._asdict(), "split": "selection", "decoding": "sampled", **policy.selection}
        for (split, decoding), answers in policy.answers.items():
            names = ("judge", "kl", "length", *answers.behavior)
            means = {name: _mean(answers.values(name)) for name in names}
            yield {**key._asdict(), "split": split, "decoding": decoding, **means}


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _curve_rows(results: Results) -> Iterable[dict[str, Any]]:
    for key, policy in results.policies.items():
        for row in policy.curve:
            yield {**key._asdict(), **row}


def _choice_rows(results: Results) -> Iterable[dict[str, Any]]:
    for protocol in SINGLE:
        for world in results.worlds:
            for arm in results.arms:
                for policies in read(results, protocol, world, arm).values():
                    yield {"protocol": protocol, **policies[0].key._asdict()}


def _examples(results: Results) -> list[ReportExample]:
    """For each example prompt the sampled answer of every arm as published, of the first seed."""
    examples = []
    for (world, split, prompt), rows in results.examples.items():
        responses = tuple(_example_response(arm, rows[arm]) for arm in in_order(list(rows)))
        examples.append(ReportExample(f"{world}, {SPLIT_NAMES.get(split, split)}\n{prompt}", responses))
    return examples


def _example_response(arm: str, row: Mapping[str, Any]) -> ExampleResponse:
    return ExampleResponse(arm, row["response"], facts=(("judge", format_value(float(row["judge"]))),))


def _print(table: Table) -> None:
    """Print a table in as many pieces as fit the console beside its first column."""
    rows = [[_clipped(row[0]), *(None if cell is None else _plain(cell) for cell in row[1:])] for row in table.rows]
    texts = [list(table.columns), *([format_value(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(table.columns))]
    pieces: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        if len(pieces[-1]) > 1 and sum(widths[i] + 2 for i in pieces[-1]) + widths[column] > CONSOLE_WIDTH:
            pieces.append([0])
        pieces[-1].append(column)
    for number, piece in enumerate(pieces, 1):
        title = table.title + (f" ({number} of {len(pieces)})" if len(pieces) > 1 else "")
        print_table(title, [table.columns[i] for i in piece], [[row[i] for i in piece] for row in rows])
    if table.note:
        print(textwrap.fill(table.note, CONSOLE_WIDTH), flush=True)


def _plain(cell: object) -> object:
    return cell if isinstance(cell, (int, float)) else str(cell)


def _clipped(name: object) -> str:
    text = str(name)
    return text if len(text) <= _FIRST_COLUMN else text[: _FIRST_COLUMN - 1] + "…"
