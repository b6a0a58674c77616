"""Charts of a study: win rates by protocol, the frontier of judge score and KL, and training."""

import dataclasses
import math
from collections.abc import Sequence

from jaxrm.evaluation.over_optimization import TrainingCurve
from jaxrm.reports.report import Curves, Interval, Intervals, Series
from jaxrm.study.arms import BASELINE
from jaxrm.study.curves import curves_of, end_points, frontier, mean_along
from jaxrm.study.readings import PROTOCOLS
from jaxrm.study.results import SPLIT_NAMES, SPLITS, Results
from jaxrm.study.tables import reading_mean
from jaxrm.study.win_rates import ALL_WORLDS, ArmWinRate, select
from jaxrm.study.worlds import bias_of, task_of

# What a world's annotator overrates, or what that makes a policy do.
KEY_BEHAVIOR = {"safety": "refusal_on_benign", "summarize": "excess_items", "dialogue": "sycophantic"}


def win_rate_charts(results: Results, rates: Sequence[ArmWinRate]) -> list[Intervals]:
    """A dot for each arm and protocol, against the baseline, over all worlds if there are several."""
    charts = []
    worlds = [rate.world for rate in rates]
    world = ALL_WORLDS if ALL_WORLDS in worlds else next(iter(worlds), "")
    for split in SPLITS:
        shown = select(rates, world=world, split=split, decoding="sampled", opponent=BASELINE)
        shown = [rate for rate in shown if not math.isnan(rate.rate.rate)]
        rows = [
            Interval(rate.arm, protocol, rate.rate.rate, rate.rate.low, rate.rate.high)
            for protocol in PROTOCOLS
            for rate in shown
            if rate.protocol == protocol
        ]
        rows.sort(key=lambda row: results.arms.index(row.name))
        if rows:
            title = f"{world}: win rate against {BASELINE}, {SPLIT_NAMES[split]}"
            charts.append(Intervals(title, "percent, with 95 % intervals over seeds", tuple(rows), middle=0.5))
    return charts


def curve_charts(results: Results) -> list[Curves]:
    """The dial of biases, if there is one; for each world the frontier, every setting, and the published training."""
    charts = _bias_charts(results)
    for world in results.worlds:
        charts += [_frontier_chart(results, world), _ends_chart(results, world)]
        charts += [_training_chart(results, world, name, unit) for name, unit in _measures(results, world)]
    return [chart for chart in charts if chart.series]


def _bias_charts(results: Results) -> list[Curves]:
    """The judge's mark, and the behavior that is overrated, by the annotator's bias."""
    charts = []
    for task in dict.fromkeys(map(task_of, results.worlds)) if results.has_biases else ():
        worlds = sorted((world for world in results.worlds if task_of(world) == task), key=bias_of)
        for name, unit in (("judge", "mean judge score"), (KEY_BEHAVIOR.get(task, ""), "mean")):
            series = []
            for arm in results.arms:
                means = [reading_mean(results, "published", world, arm, SPLITS[0], name) for world in worlds]
                series.append(Series(arm, tuple(map(bias_of, worlds)), tuple(mean.mean for mean in means)))
            note = "As published, in distribution. 0: the annotator likes what the judge likes. A mean over seeds."
            title = f"{task}: {name.replace('_', ' ')} by the annotator's bias"
            charts.append(_chart(title, f"times the bias of {task}", unit, series, note))
    return charts


def _frontier_chart(results: Results, world: str) -> Curves:
    """The best of all settings and checkpoints within each KL; other arms have one point for each setting."""
    largest = max((kl for arm in results.rewarded_arms for kl, _ in end_points(results, world, arm)), default=1.0)
    levels = [largest * n / 60 for n in range(61)]
    series = [
        Series(arm, tuple(levels), tuple(frontier(results, world, arm, levels)))
        for arm in results.rewarded_arms
        if results.policies_of(world, arm)
    ]
    note = "The best of all settings and checkpoints with at most so much KL; a mean over seeds, on selection prompts."
    return _chart(f"{world}: the best within a KL", _kl_label(world), "mean judge score", series, note)


def _ends_chart(results: Results, world: str) -> Curves:
    """A dot for each setting at the end of its training."""
    series = []
    for arm in results.arms:
        points = end_points(results, world, arm)
        series.append(Series(arm, tuple(kl for kl, _ in points), tuple(judge for _, judge in points)))
    note = "Each dot is a setting at the end of its training, a mean over seeds on selection prompts. "
    note += "Of best-of-n the KL is a bound."
    chart = _chart(f"{world}: where every setting ends", _kl_label(world), "mean judge score", series, note)
    return dataclasses.replace(chart, is_scatter=True)


def _training_chart(results: Results, world: str, name: str, unit: str) -> Curves:
    series = [
        _by_step(arm, mean_along(curves_of(results, "published", world, arm), name)) for arm in results.rewarded_arms
    ]
    note = "The published setting, a mean over seeds on selection prompts."
    return _chart(f"{world}: {name.replace('_', ' ')} along training", f"step ({world})", unit, series, note)


def _by_step(arm: str, curve: TrainingCurve) -> Series:
    return Series(arm, tuple(float(step) for step in curve.steps), tuple(curve.values))


def _measures(results: Results, world: str) -> list[tuple[str, str]]:
    """The quantities whose training is shown, with their units."""
    behaviors = results.behaviors(world)
    key = KEY_BEHAVIOR.get(task_of(world))
    key = key if key in behaviors else next(iter(behaviors), None)
    shown = [
        ("judge", "mean judge score"),
        ("reward", "standard deviations of the SFT policy's"),
        ("kl", "nats a response"),
    ]
    return [*shown, ("length", "tokens"), *([(key, "mean")] if key else [])]


def _kl_label(world: str) -> str:
    return f"KL from the SFT policy, nats a response ({world})"


def _chart(title: str, x_label: str, y_label: str, series: Sequence[Series], note: str) -> Curves:
    shown = tuple(each for each in series if any(y is not None and math.isfinite(y) for y in each.y))
    return Curves(title, x_label, y_label, shown, note, in_order=True)
