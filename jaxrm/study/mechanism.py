"""A page that shows why: what two reward models pay for in one world, before and after training by each of them.

The same answers, of the SFT policy and of the two arms as published, are read by both models. Rewards are in standard
deviations of those of the SFT policy's answers, and so is the judge's mark where the two are compared.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm.evaluation.win_rate import Mean, mean_interval
from jaxrm.reports.report import (
    Curves,
    ExampleResponse,
    Report,
    ReportExample,
    Series,
    SourceRewards,
    Table,
    write_report,
)
from jaxrm.runtime.metrics import read_rows
from jaxrm.runtime.progress import format_value
from jaxrm.stages.evaluate.run import ANSWERS
from jaxrm.study.charts import KEY_BEHAVIOR
from jaxrm.study.config import Study
from jaxrm.study.curves import curves_of, mean_along
from jaxrm.study.intervals import interval_note, mean_cells
from jaxrm.study.results import Results
from jaxrm.study.run_configs import MECHANISM, MECHANISM_KINDS, mechanism_name

PAGE = "mechanism.html"
_EXAMPLES = 12
_POLICIES = ("sft", *MECHANISM)

Rows = Sequence[Mapping[str, Any]]
Answered = Mapping[str, Mapping[int, Rows]]
"""Rows of answers, read by both models, by policy and seed."""


def write_mechanism(study: Study, results: Results, folder: Path, done: Collection[str]) -> None:
    """Write ``mechanism.html``, if the runs for it are done with at least one seed.

    Args:
      study: from `jaxrm.study.presets.apply_preset`.
      results: of the study so far.
      folder: of the study.
      done: names of its runs that are done.
    """
    world = study.mechanism or ""
    names = {arm: {seed: mechanism_name(world, seed, arm) for seed in study.seeds or ()} for arm in _POLICIES}
    seeds = [seed for seed in study.seeds or () if all(names[arm][seed] in done for arm in _POLICIES)]
    if not seeds:
        return
    answered = {
        arm: {seed: read_rows(folder / "runs" / names[arm][seed] / ANSWERS) for seed in seeds} for arm in _POLICIES
    }
    behavior = KEY_BEHAVIOR[world]
    page = Report(
        title=f"Why: what two reward models pay for in {world}",
        about=[("Seeds", str(len(seeds))), ("Setting", "as published"), ("Behavior", behavior.replace("_", " "))],
        tables=[*over_credit_tables(answered, behavior)],
        curves=_charts(results, world),
        examples=_examples(answered, seeds[0], behavior),
    )
    write_report(folder / PAGE, page)
    print(f"What the reward models pay for is in {folder / PAGE}")


def over_credit_tables(answered: Answered, behavior: str) -> list[Table]:
    """What the models pay for a behavior that the annotator overrates, and for what training did.

    Args:
      answered: by ``sft`` and by both arms.
      behavior: of the world; above 0 where an answer shows it.
    """
    name = behavior.replace("_", " ")
    measures = (*MECHANISM_KINDS, "judge")
    first: list[tuple[Any, ...]] = []
    second: list[tuple[Any, ...]] = []
    means: list[Mean] = []
    for policy in _POLICIES:
        by_seed = answered[policy]
        shares = mean_interval([[_share(rows, behavior)] for rows in by_seed.values()])
        gaps = {
            measure: mean_interval(
                [[_gap(by_seed[seed], answered["sft"][seed], behavior, measure)] for seed in by_seed]
            )
            for measure in measures
        }
        over = [
            mean_interval([[_over_credit(by_seed[seed], answered["sft"][seed], behavior, kind)] for seed in by_seed])
            for kind in MECHANISM_KINDS
        ]
        moved = {
            measure: mean_interval([[_moved(by_seed[seed], answered["sft"][seed], measure)] for seed in by_seed])
            for measure in measures
        }
        agreement = [
            mean_interval([[_correlation(rows, kind)] for rows in by_seed.values()]) for kind in MECHANISM_KINDS
        ]
        means += [shares, *gaps.values(), *moved.values()]
        first.append(
            (policy, *mean_cells([shares]), *mean_cells([*gaps.values()], signed=True), *mean_cells(over, signed=True))
        )
        second.append((policy, *mean_cells([*moved.values()], signed=True), *mean_cells(agreement)))
    kinds = list(MECHANISM_KINDS)
    note = (
        "Of the answers of each policy, those that show the behavior less those that do not, in standard deviations "
        "over the SFT policy's answers. Over-credit: what a model gives for it less what the judge gives. "
    )
    columns = (
        "answers of",
        "share",
        *(f"{kind} pays" for kind in kinds),
        "judge pays",
        *(f"{kind} over-credits" for kind in kinds),
    )
    moved_note = (
        "How far each policy moved from the SFT policy by each measure, in standard deviations over the SFT policy's "
        "answers; then the correlation of each model's reward with the judge's mark over its answers. "
    )
    moved_columns = (
        "answers of",
        *(f"{kind} reward" for kind in kinds),
        "judge's mark",
        *(f"r of {kind} with judge" for kind in kinds),
    )
    return [
        Table(f"What is paid for: {name}", columns, tuple(first), note + interval_note(means)),
        Table("What training gained", moved_columns, tuple(second), moved_note),
    ]


def _over_credit(rows: Rows, start: Rows, behavior: str, kind: str) -> float:
    return _gap(rows, start, behavior, kind) - _gap(rows, start, behavior, "judge")


def _values(rows: Rows, measure: str) -> np.ndarray:
    if measure == "judge":
        return np.array([float(row["judge"]) for row in rows])
    return np.array([float(row["sources"][measure]["reward"]) for row in rows])


def _spread(start: Rows, measure: str) -> float:
    spread = float(np.std(_values(start, measure)))
    return spread if spread > 0 else math.nan


def _shows(rows: Rows, behavior: str) -> np.ndarray:
    """1 where an answer shows the behavior, 0 where not, NaN where it does not apply."""
    values = [row["behaviour"].get(behavior) for row in rows]
    return np.array([math.nan if value is None else float(value > 0) for value in values])


def _share(rows: Rows, behavior: str) -> float:
    shows = _shows(rows, behavior)
    return float(np.nanmean(shows)) if np.isfinite(shows).any() else math.nan


def _gap(rows: Rows, start: Rows, behavior: str, measure: str) -> float:
    """What a measure gives answers that show a behavior, less what it gives those that do not."""
    shows, values = _shows(rows, behavior), _values(rows, measure)
    if not (shows == 1).any() or not (shows == 0).any():
        return math.nan
    return float((values[shows == 1].mean() - values[shows == 0].mean()) / _spread(start, measure))


def _moved(rows: Rows, start: Rows, measure: str) -> float:
    return float((_values(rows, measure).mean() - _values(start, measure).mean()) / _spread(start, measure))


def _correlation(rows: Rows, kind: str) -> float:
    reward, judge = _values(rows, kind), _values(rows, "judge")
    return float(np.corrcoef(reward, judge)[0, 1]) if reward.std() > 0 and judge.std() > 0 else math.nan


def _charts(results: Results, world: str) -> list[Curves]:
    """Reward and judge score along training, of both arms."""
    charts = []
    for name, unit in (("reward", "of the arm's own model, standard deviations"), ("judge", "mean judge score")):
        series = []
        for arm in MECHANISM:
            curve = mean_along(curves_of(results, "published", world, arm), name)
            series.append(Series(arm, tuple(map(float, curve.steps)), tuple(curve.values)))
        shown = tuple(each for each in series if each.x)
        charts.append(Curves(f"{name} along training", "step", unit, shown, "A mean over seeds, on selection prompts."))
    return [chart for chart in charts if chart.series]


def _examples(answered: Answered, seed: int, behavior: str) -> list[ReportExample]:
    """Prompts on which the first arm ends with the behavior, then others, with the token rewards of both models."""
    rows = {policy: answered[policy][seed] for policy in _POLICIES}
    shows = _shows(rows[MECHANISM[0]], behavior)
    order = sorted(range(len(shows)), key=lambda n: (shows[n] != 1, math.isnan(shows[n]), n))
    examples = []
    for n in order[:_EXAMPLES]:
        responses = tuple(_response(policy, rows[policy][n]) for policy in _POLICIES)
        tags = (behavior.replace("_", " "),) if shows[n] == 1 else ()
        examples.append(ReportExample(rows["sft"][n]["prompt"], responses, tags))
    return examples


def _response(policy: str, row: Mapping[str, Any]) -> ExampleResponse:
    sources = tuple(
        SourceRewards(kind, source["weight"], source["reward"], tuple(source.get("rewards", ())))
        for kind, source in row["sources"].items()
        if source.get("rewards")
    )
    facts = (("judge", format_value(float(row["judge"]))),)
    tokens = tuple(str(token) for token in row.get("tokens") or ())
    return ExampleResponse(policy, row["response"], tokens, facts=facts, sources=sources if tokens else ())
