"""What trainings by rewards measured on the selection prompts: over-optimization, equal KL, the frontier."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrm.evaluation.over_optimization import TrainingCurve, at_kl, mean_curve, reach
from jaxrm.evaluation.win_rate import Mean, difference_interval, mean_interval
from jaxrm.reports.report import Table
from jaxrm.study.arms import BASELINE
from jaxrm.study.config import BEST
from jaxrm.study.intervals import interval_note, mean_cells
from jaxrm.study.readings import SINGLE, read
from jaxrm.study.results import JsonRow, Results, as_float

Runs = Mapping[int, Sequence[JsonRow]]
"""The rows along a training, by seed."""


def curves_of(results: Results, protocol: str, world: str, arm: str) -> Runs:
    """The trainings of the policies that a protocol chooses; the best checkpoint has that of its setting."""
    chosen = read(results, protocol, world, arm)
    return {seed: policies[0].curve for seed, policies in chosen.items() if policies and policies[0].curve}


def mean_along(runs: Runs, name: str) -> TrainingCurve:
    """Mean over seeds of a quantity along training."""
    curves = [
        TrainingCurve([row["step"] for row in rows], column(rows, "kl"), column(rows, name)) for rows in runs.values()
    ]
    return mean_curve(curves)


def frontier(results: Results, world: str, arm: str, levels: Sequence[float]) -> list[float]:
    """For each KL the highest judge score that any checkpoint of any setting has within it, a mean over seeds.

    Args:
      results: of the study.
      world: of the study.
      arm: that rewards train.
      levels: KL, nats a response.

    Returns:
      Scores; NaN before the first checkpoint of a seed.
    """
    by_seed = []
    for policies in results.policies_of(world, arm).values():
        points = [(max(float(row["kl"]), 0.0), float(row["judge"])) for policy in policies for row in policy.curve]
        by_seed.append([max((judge for kl, judge in points if kl <= level), default=math.nan) for level in levels])
    return [float(np.mean(scores)) for scores in zip(*by_seed, strict=True)] if by_seed else []


def end_points(results: Results, world: str, arm: str) -> list[tuple[float, float]]:
    """KL and judge score at the end of each setting, means over seeds; by ascending KL."""
    by_setting: dict[str, list[tuple[float, float]]] = {}
    for policies in results.policies_of(world, arm).values():
        for policy in policies:
            kl, judge = (policy.selection.get(name, math.nan) for name in ("kl", "judge"))
            if policy.key.setting != BEST and math.isfinite(kl) and math.isfinite(judge):
                by_setting.setdefault(policy.key.setting, []).append((kl, judge))
    means = [
        (float(np.mean([kl for kl, _ in ends])), float(np.mean([y for _, y in ends]))) for ends in by_setting.values()
    ]
    return sorted(means)


def equal_kl_tables(results: Results) -> list[Table]:
    """The arms at the largest KL that all of a world reach, and at one that half reach, by protocol."""
    tables = []
    for protocol in SINGLE:
        if protocol == "best checkpoint":  # whose training is that of a setting that no protocol chose for its end
            continue
        for world in results.worlds:
            runs = {arm: curves_of(results, protocol, world, arm) for arm in results.rewarded_arms}
            reached = {arm: reach([column(rows, "kl") for rows in runs[arm].values()]) for arm in runs if runs[arm]}
            levels = sorted({min(reached.values()), float(np.median(list(reached.values())))}) if reached else []
            tables += [_equal_kl_table(results, (protocol, world), level, runs) for level in levels if level > 0.01]
    return tables


def _equal_kl_table(results: Results, read_as: tuple[str, str], level: float, all_runs: Mapping[str, Runs]) -> Table:
    """One table at one KL.

    Args:
      results: of the study.
      read_as: the protocol and the world.
      level: KL, nats a response.
      all_runs: the trainings by arm.
    """
    protocol, world = read_as
    measures = ["judge", "length", *results.behaviors(world)]
    reached = {arm: reach([column(rows, "kl") for rows in runs.values()]) for arm, runs in all_runs.items() if runs}
    arms = [arm for arm, kl in reached.items() if kl >= level * (1 - 1e-9)]
    means = {
        name: [mean_interval([[_at_kl(rows, name, level)] for rows in all_runs[arm].values()]) for arm in arms]
        for name in measures
    }
    cells = {name: mean_cells(values) for name, values in means.items()}
    baseline = all_runs.get(BASELINE, {})
    differences = mean_cells(
        [_difference(all_runs[arm], baseline if arm != BASELINE else {}, level) for arm in arms], signed=True
    )
    rows: list[tuple[Any, ...]] = []
    for arm, kl in reached.items():
        if arm not in arms:
            rows.append((arm, kl, "not reached", *[None] * len(measures)))
            continue
        n = arms.index(arm)
        rows.append((arm, kl, cells["judge"][n], differences[n], *(cells[name][n] for name in measures[1:])))
    columns = ("arm", "KL reached", "judge", f"less {BASELINE}", *measures[1:])
    note = (
        "Interpolated along each training, on the selection prompts, where its KL first reached "
        f"{level:.3g} nats a response. KL reached: by every seed. "
    )
    title = f"{world}: at an equal KL of {level:.3g}, {protocol}"
    return Table(title, columns, tuple(rows), note + interval_note(means["judge"]), is_folded=True)


def _difference(runs: Runs, baseline: Runs, level: float) -> Mean:
    """By how much a judge score is above the baseline's at a KL, over the seeds that both have."""
    seeds = sorted(runs.keys() & baseline.keys())
    if not seeds:
        return mean_interval([])
    scores, others = ([[_at_kl(side[seed], "judge", level)] for seed in seeds] for side in (runs, baseline))
    return difference_interval(scores, others)


def training_table(results: Results) -> list[Table]:
    """Judge score and reward along the published training, which shows over-optimization."""
    rows: list[tuple[str | float | None, ...]] = []
    for world in results.worlds:
        for arm in results.rewarded_arms:
            runs = curves_of(results, "published", world, arm)
            judge, reward = (mean_along(runs, name) for name in ("judge", "reward"))
            if not judge.steps or not np.isfinite(judge.values).any():
                continue
            best = int(np.nanargmax(judge.values))
            scores = (judge.values[0], judge.values[best], judge.steps[best], judge.values[-1], judge.kl[-1])
            rows.append((f"{world}, {arm}", *scores, reward.values[0], reward.values[-1]))
    columns = ("arm", "judge at first", "best", "at step", "last", "KL at last", "reward at first", "last reward")
    note = (
        "The published setting, means over seeds on the selection prompts; the reward is the arm's own, in standard "
        "deviations of the SFT policy's. A last judge score below the best one while the reward rises is "
        "over-optimization."
    )
    return [Table("Along training, published", columns, tuple(rows), note)] if rows else []


def column(rows: Sequence[JsonRow], name: str) -> list[float]:
    """A quantity along a training: a field of its rows, or a behavior."""
    return [as_float(row[name] if name in row else row["behaviour"].get(name)) for row in rows]


def _at_kl(rows: Sequence[JsonRow], name: str, level: float) -> float:
    value = at_kl(column(rows, "kl"), column(rows, name), level)
    return math.nan if value is None else value
