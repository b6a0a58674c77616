"""Training curves of a study: means over seeds, and tables at equal KL."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrm.evaluation.over_optimization import TrainingCurve, at_kl, mean_curve, reach
from jaxrm.evaluation.win_rate import Mean, difference_interval, mean_interval
from jaxrm.reports.report import Table
from jaxrm.study.config import PPO
from jaxrm.study.intervals import interval_note, mean_cells
from jaxrm.study.results import Results, as_float, in_order
from jaxrm.study.win_rates import BASELINE


def trained_arms(results: Results, world: str) -> list[str]:
    """The arms that were measured during training; the other arms have one point."""
    curves = {arm: runs for (curve_world, arm), runs in results.curves.items() if curve_world == world}
    return in_order(arm for arm, runs in curves.items() if any(len(rows) > 1 for rows in runs.values()))


def arm_curve(results: Results, world: str, arm: str, name: str) -> TrainingCurve:
    """Mean over seeds of a quantity along training."""
    runs = results.curves.get((world, arm), {}).values()
    return mean_curve(
        [TrainingCurve([row["step"] for row in rows], _column(rows, "kl"), _column(rows, name)) for rows in runs]
    )


def equal_kl_tables(results: Results) -> list[Table]:
    """Each trained arm at the largest KL that all PPO arms of a world reach, and at one that about half reach."""
    tables = []
    for world in results.worlds:
        reached = {
            arm: reach([_column(rows, "kl") for rows in results.curves[world, arm].values()])
            for arm in trained_arms(results, world)
        }
        if not reached:
            continue
        ppo_kls = [kl for arm, kl in reached.items() if arm.startswith(PPO)] or list(reached.values())
        levels = sorted({min(ppo_kls), float(np.median(ppo_kls))})
        tables += [_equal_kl_table(results, world, level, reached) for level in levels if level > 0]
    return tables


def _equal_kl_table(results: Results, world: str, level: float, reached: Mapping[str, float]) -> Table:
    """One table at one KL.

    Args:
      results: of the study.
      world: of the table.
      level: KL, nats a response.
      reached: the KL that every seed of an arm reached, by arm.
    """
    measures = ["judge", "length", *results.behaviors(world)]
    arms = [arm for arm, kl in reached.items() if kl >= level * (1 - 1e-9)]
    means = {
        name: [
            mean_interval([[_at_kl(rows, name, level)] for rows in results.curves[world, arm].values()]) for arm in arms
        ]
        for name in measures
    }
    cells = {name: mean_cells(column) for name, column in means.items()}
    differences = mean_cells([_difference_from_baseline(results, world, arm, level) for arm in arms], signed=True)
    rows: list[tuple[Any, ...]] = []
    for arm, kl in reached.items():
        if arm not in arms:
            rows.append((arm, kl, "not reached", *[None] * len(measures)))
            continue
        n = arms.index(arm)
        rows.append((arm, kl, cells["judge"][n], differences[n], *(cells[name][n] for name in measures[1:])))
    columns = ("arm", "KL reached", "judge", f"less {BASELINE}", *measures[1:])
    note = (
        "Interpolated along each final run, on the selection prompts, where its KL first reached "
        f"{level:.3g} nats a response. KL reached: by every seed. "
    )
    return Table(f"{world}: at an equal KL of {level:.3g}", columns, tuple(rows), note + interval_note(means["judge"]))


def _difference_from_baseline(results: Results, world: str, arm: str, level: float) -> Mean:
    """By how much an arm's judge score is above the baseline's at a KL, over the seeds that both have."""
    runs, baseline = results.curves[world, arm], results.curves.get((world, BASELINE), {})
    seeds = sorted(runs.keys() & baseline.keys()) if arm != BASELINE else []
    if not seeds:
        return mean_interval([])
    scores, baseline_scores = ([[_at_kl(side[seed], "judge", level)] for seed in seeds] for side in (runs, baseline))
    return difference_interval(scores, baseline_scores)


def training_table(results: Results) -> list[Table]:
    """Judge score and reward along training, which shows over-optimization."""
    rows: list[tuple[str | float | None, ...]] = []
    for world in results.worlds:
        for arm in trained_arms(results, world):
            judge, reward = (arm_curve(results, world, arm, name) for name in ("judge", "reward"))
            if not judge.steps or not np.isfinite(judge.values).any():
                continue
            best = int(np.nanargmax(judge.values))
            scores = (judge.values[0], judge.values[best], judge.kl[best], judge.values[-1], judge.kl[-1])
            rewards = (reward.values[0], reward.values[-1]) if np.isfinite(reward.values).all() else (None, None)
            rows.append((f"{world}, {arm}", *scores, *rewards))
    columns = ("arm", "judge at first", "best", "KL there", "last", "KL there", "reward at first", "last")
    note = (
        "Means over the seeds of the final runs, on the selection prompts. A last judge score below the best one while "
        "the reward rises is over-optimization."
    )
    return [Table("Along training", columns, tuple(rows), note)] if rows else []


def _at_kl(rows: Sequence[Mapping[str, Any]], name: str, level: float) -> float:
    value = at_kl(_column(rows, "kl"), _column(rows, name), level)
    return math.nan if value is None else value


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A quantity along a training run: a field of its rows, or a behavior."""
    return [as_float(row[name] if name in row else row["behaviour"].get(name)) for row in rows]
