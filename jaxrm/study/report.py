"""What a study says when it ends, or so far: tables, ``win_rates.jsonl`` and ``report.html`` in its folder."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jaxrm import atomic
from jaxrm.evaluation.over_optimization import Path as Along
from jaxrm.evaluation.over_optimization import mean_path
from jaxrm.reports.report import Curves, Example, ExampleResponse, Series, Table, write_report
from jaxrm.runtime.metrics import json_line
from jaxrm.runtime.progress import format_value, print_table
from jaxrm.study import tables as study_tables
from jaxrm.study.results import Results, in_order, number, read_results
from jaxrm.study.tables import ALL, WORDS, Comparison

WIDTH = 110  # of the console
_FIRST = 34  # most of a column of names
# What a world's annotator pays too much for, or what that makes a policy do.
_KEY_BEHAVIOUR = {"safety": "refusal_on_benign", "summarize": "excess_items", "dialogue": "sycophantic"}
_KL = "KL from the SFT policy, nats a response"


def close(
    folder: Path, *, about: Sequence[tuple[str, str]], expected: Sequence[tuple[str, str, int]] | None = None
) -> None:
    """Print the tables of a study and write ``win_rates.jsonl`` and ``report.html`` in its folder.

    Args:
      folder: the study, finished or not.
      about: ``(name, value)`` lines below the report's heading.
      expected: every ``(world, arm, seed)`` that the study is to have, for what is missing; None infers it from what
        the other arms and worlds have.

    Raises:
      UserError: a file of results cannot be read, or two arms were asked different prompts.
    """
    results = read_results(folder)
    found = study_tables.comparisons(results)
    matrices = study_tables.win_rate_tables(found)
    rest = [
        *study_tables.arm_tables(results, found),
        *study_tables.equal_kl_tables(results),
        *study_tables.along_table(results, lambda world, arm, name: _path(results, world, arm, name)),
        *study_tables.agreement_table(results),
        *study_tables.settings_table(results),
    ]
    missing = study_tables.missing_table(results, expected)
    for table in [*(matrix for matrix in matrices if _is_printed(matrix, matrices)), *rest, *missing]:
        _print(table)
    if not matrices and not rest:
        print(f"There are no results in {folder / 'results'} yet.")
    rates, report = folder / "win_rates.jsonl", folder / "report.html"
    atomic.write_text(rates, "".join(json_line(_row(each)) for each in found))
    write_report(
        report,
        title=f"{folder.name}: what came of it",
        about=about,
        tables=[*matrices, *rest, *missing],
        curves=curves(results),
        examples=examples(results),
    )
    print(f"The win rates are in {rates}; the report is {report}", flush=True)


def curves(results: Results) -> list[Curves]:
    """For each world the mean over seeds of each arm: judge, length and key behaviour by KL, judge by reward.

    Arms without training have one point; that of best-of-n is at a bound of its KL.
    """
    charts = []
    for world in results.worlds:
        arms = in_order(arm for where, arm in results.curves if where == world)
        watched = results.behaviours(world)
        key = _KEY_BEHAVIOUR.get(world)
        key = key if key in watched else next(iter(watched), None)
        wanted = [("judge", "mean mark"), ("length", "tokens"), *([(key, "mean")] if key else [])]
        counts = {len(results.curves[world, arm]) for arm in arms}
        seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
        note = f"Mean over seeds ({seeds}) on the selection prompts, in the order of training; "
        note += "of best-of-n one point, at an upper bound of its KL."
        for name, unit in wanted:
            series = [_series(arm, _path(results, world, arm, name)) for arm in arms]
            charts.append(_chart(f"{world}: {name.replace('_', ' ')}", f"{_KL} ({world})", unit, series, note))
        series = []
        for arm in study_tables.watched_arms(results, world):
            judge, reward = (_path(results, world, arm, name) for name in ("judge", "reward"))
            if any(map(math.isfinite, reward.values)):  # DPO and imitation are paid nothing
                series.append(_series(arm, Along(judge.steps, reward.values, judge.values)))
        label = f"reward of the arm's own model, calibrated ({world})"
        charts.append(_chart(f"{world}: judge against reward", label, "mean mark", series, note))
    return [chart for chart in charts if chart.series]


def examples(results: Results) -> list[Example]:
    """For each kept prompt the sampled answer of every arm, of the world's first seed."""
    made = []
    for (world, split, prompt), rows in results.examples.items():
        responses = []
        for arm in in_order(rows):
            row = rows[arm]
            facts = tuple(
                (name, format_value(float(row[name]))) for name in ("judge", "reward") if row.get(name) is not None
            )
            tokens = tuple(str(token) for token in row.get("tokens") or ())
            rewards = tuple(number(reward) for reward in row.get("rewards") or ())
            if len(rewards) != len(tokens):
                rewards = ()
            responses.append(ExampleResponse(arm, row["response"], tokens, rewards, facts))
        made.append(Example(f"{world}, {WORDS.get(split, split)}\n{prompt}", tuple(responses)))
    return made


def _path(results: Results, world: str, arm: str, name: str) -> Along:
    """Mean over seeds of a quantity along training."""
    runs = results.curves.get((world, arm), {}).values()
    paths = []
    for rows in runs:
        values = [number(row[name] if name in row else row["behaviour"].get(name)) for row in rows]
        paths.append(Along([row["step"] for row in rows], [number(row["kl"]) for row in rows], values))
    return mean_path(paths)


def _series(name: str, path: Along) -> Series:
    return Series(name, tuple(path.kl), tuple(path.values))


def _chart(title: str, x_label: str, y_label: str, series: Sequence[Series], note: str) -> Curves:
    held = tuple(each for each in series if any(math.isfinite(y) for y in each.y if y is not None))
    return Curves(title, x_label, y_label, held, note, in_order=True)


def _row(each: Comparison) -> dict[str, str | float | int | None]:
    named = {name: getattr(each, name) for name in ("world", "split", "decoding", "arm", "opponent")}
    return named | {name: getattr(each.found, name) for name in ("rate", "low", "high", "seeds", "prompts", "note")}


def _is_printed(matrix: Table, matrices: Sequence[Table]) -> bool:
    """The console has the sampled matrices, and the greedy ones over all worlds; the report has all."""
    is_pooled = matrix.title.startswith(f"{ALL}: ") or not any(one.title.startswith(f"{ALL}: ") for one in matrices)
    return is_pooled or matrix.title.endswith(", sampled")


def _print(table: Table) -> None:
    """Prints a table in as many pieces as fit the console beside its first column."""
    rows = [[_clipped(row[0]), *(None if cell is None else _plain(cell) for cell in row[1:])] for row in table.rows]
    texts = [list(table.columns), *([format_value(cell) for cell in row] for row in rows)]
    widths = [max(len(row[n]) for row in texts) for n in range(len(table.columns))]
    pieces: list[list[int]] = [[0]]
    for n in range(1, len(widths)):
        if len(pieces[-1]) > 1 and sum(widths[i] + 2 for i in pieces[-1]) + widths[n] > WIDTH:
            pieces.append([0])
        pieces[-1].append(n)
    for number_, piece in enumerate(pieces):
        title = table.title + (f" ({number_ + 1} of {len(pieces)})" if len(pieces) > 1 else "")
        print_table(title, [table.columns[n] for n in piece], [[row[n] for n in piece] for row in rows])
    if table.note:
        print(textwrap.fill(table.note, WIDTH), flush=True)


def _plain(cell: object) -> object:
    return cell if isinstance(cell, (int, float)) else str(cell)


def _clipped(name: object) -> str:
    text = str(name)
    return text if len(text) <= _FIRST else text[: _FIRST - 1] + "…"
