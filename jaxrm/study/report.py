"""Tables of a study on the console, and ``win_rates.jsonl`` and ``report.html`` in its folder."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.evaluation.over_optimization import TrainingCurve
from jaxrm.reports.report import Curves, ExampleResponse, ReportExample, Series, Table, write_report
from jaxrm.runtime.metrics import json_line
from jaxrm.runtime.progress import format_value, print_table
from jaxrm.study.curves import arm_curve, equal_kl_tables, trained_arms, training_table
from jaxrm.study.results import Results, as_float, in_order, read_results
from jaxrm.study.tables import agreement_table, arm_tables, missing_table, settings_table
from jaxrm.study.win_rates import ALL_WORLDS, SPLIT_NAMES, ArmWinRate, win_rate_tables, win_rates

CONSOLE_WIDTH = 110
_FIRST_COLUMN = 34  # most characters of a name in the first column
# What a world's annotator overrates, or what that makes a policy do.
_KEY_BEHAVIOUR = {"safety": "refusal_on_benign", "summarize": "excess_items", "dialogue": "sycophantic"}


def publish(
    folder: Path, *, about: Sequence[tuple[str, str]], expected: Sequence[tuple[str, str, int]] | None = None
) -> None:
    """Print the tables of a study and write ``win_rates.jsonl`` and ``report.html`` in its folder.

    Args:
      folder: of the study, which may be unfinished.
      about: ``(name, value)`` lines below the report's heading.
      expected: every ``(world, arm, seed)`` that the study is to have, for the table of what is missing; None infers
        them from what the other arms and worlds have.

    Raises:
      UserError: a file of results cannot be read, or two arms have answers to different prompts.
    """
    results = read_results(folder)
    rates = win_rates(results)
    matrices = win_rate_tables(rates)
    tables = [
        *arm_tables(results, rates),
        *equal_kl_tables(results),
        *training_table(results),
        *agreement_table(results),
        *settings_table(results),
    ]
    missing = missing_table(results, expected)
    for table in [*(matrix for matrix in matrices if _is_printed(matrix, matrices)), *tables, *missing]:
        _print(table)
    if not matrices and not tables:
        print(f"There are no results in {folder / 'results'} yet.")
    rates_file, report_file = folder / "win_rates.jsonl", folder / "report.html"
    atomic.write_text(rates_file, "".join(json_line(_win_rate_row(each)) for each in rates))
    write_report(
        report_file,
        title=f"{folder.name}: results",
        about=about,
        tables=[*matrices, *tables, *missing],
        curves=_charts(results),
        examples=_examples(results),
    )
    print(f"The win rates are in {rates_file}; the report is {report_file}", flush=True)


def _charts(results: Results) -> list[Curves]:
    """For each world the mean over seeds of each arm: judge, length and key behavior by KL, and judge by reward."""
    charts = []
    for world in results.worlds:
        arms = in_order(arm for curve_world, arm in results.curves if curve_world == world)
        seed_counts = {len(results.curves[world, arm]) for arm in arms} or {0}
        low, high = min(seed_counts), max(seed_counts)
        note = (
            f"Mean over seeds ({low if low == high else f'{low} to {high}'}) on the selection prompts, in the order of "
            "training; of best-of-n one point, at an upper bound of its KL."
        )
        kl_label = f"KL from the SFT policy, nats a response ({world})"
        for name, unit in _charted(results, world):
            series = [_series(arm, arm_curve(results, world, arm, name)) for arm in arms]
            charts.append(_chart(f"{world}: {name.replace('_', ' ')}", kl_label, unit, series, note))
        reward_label = f"reward of the arm's own model, scaled ({world})"
        series = _judge_by_reward(results, world)
        charts.append(_chart(f"{world}: judge against reward", reward_label, "mean judge score", series, note))
    return [chart for chart in charts if chart.series]


def _charted(results: Results, world: str) -> list[tuple[str, str]]:
    """The quantities of a world that have a chart, with their units."""
    behaviors = results.behaviors(world)
    key = _KEY_BEHAVIOUR.get(world)
    key = key if key in behaviors else next(iter(behaviors), None)
    return [("judge", "mean judge score"), ("length", "tokens"), *([(key, "mean")] if key else [])]


def _judge_by_reward(results: Results, world: str) -> list[Series]:
    series = []
    for arm in trained_arms(results, world):
        judge, reward = (arm_curve(results, world, arm, name) for name in ("judge", "reward"))
        if any(map(math.isfinite, reward.values)):  # DPO and imitation have no reward
            series.append(_series(arm, TrainingCurve(judge.steps, reward.values, judge.values)))
    return series


def _series(name: str, curve: TrainingCurve) -> Series:
    return Series(name, tuple(curve.kl), tuple(curve.values))


def _chart(title: str, x_label: str, y_label: str, series: Sequence[Series], note: str) -> Curves:
    shown = tuple(each for each in series if any(math.isfinite(y) for y in each.y if y is not None))
    return Curves(title, x_label, y_label, shown, note, in_order=True)


def _examples(results: Results) -> list[ReportExample]:
    """For each example prompt the sampled answer of every arm, of the world's first seed."""
    examples = []
    for (world, split, prompt), rows in results.examples.items():
        responses = tuple(_example_response(arm, rows[arm]) for arm in in_order(rows))
        examples.append(ReportExample(f"{world}, {SPLIT_NAMES.get(split, split)}\n{prompt}", responses))
    return examples


def _example_response(arm: str, row: Any) -> ExampleResponse:
    facts = tuple((name, format_value(float(row[name]))) for name in ("judge", "reward") if row.get(name) is not None)
    tokens = tuple(str(token) for token in row.get("tokens") or ())
    rewards = tuple(as_float(reward) for reward in row.get("rewards") or ())
    return ExampleResponse(arm, row["response"], tokens, rewards if len(rewards) == len(tokens) else (), facts)


def _win_rate_row(each: ArmWinRate) -> dict[str, str | float | int | None]:
    names = {name: getattr(each, name) for name in ("world", "split", "decoding", "arm", "opponent")}
    return names | {name: getattr(each.rate, name) for name in ("rate", "low", "high", "seeds", "prompts", "note")}


def _is_printed(matrix: Table, matrices: Sequence[Table]) -> bool:
    """The console has the sampled matrices, and the greedy ones over all worlds; the report has all."""
    prefix = f"{ALL_WORLDS}: "
    is_pooled = matrix.title.startswith(prefix) or not any(each.title.startswith(prefix) for each in matrices)
    return is_pooled or matrix.title.endswith(", sampled")


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
