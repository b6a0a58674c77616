"""Cells and notes of tables for win rates and means with intervals."""

import math
from collections.abc import Sequence

from jaxrm.evaluation.win_rate import Mean, WinRate
from jaxrm.reports.report import Shaded
from jaxrm.study.win_rates import ArmWinRate

WIN_RATE_NOTE = "Share of prompts where the arm has the higher judge score, in percent; a tie counts half. "


def win_rate_cell(rate: ArmWinRate | None) -> Shaded | None:
    """``53 [51, 55]`` in percent, colored by its distance from one half, bold where the interval leaves out one half.

    A star says that it would among all comparisons of the table too.
    """
    if rate is None or math.isnan(rate.rate.rate):
        return None
    text = _percent(rate.rate.rate, rate.rate.low, rate.rate.high) + (" *" if rate.adjusted.is_sure else "")
    return Shaded(text, 4 * rate.rate.rate - 2, bool(rate.rate.verdict))  # full color at 25 % and at 75 %


def adjusted_cell(rate: ArmWinRate | None) -> Shaded | None:
    """The same with the interval that holds for all comparisons of the table together."""
    if rate is None or math.isnan(rate.rate.rate):
        return None
    several = rate.adjusted
    return Shaded(_percent(rate.rate.rate, several.low, several.high), 4 * rate.rate.rate - 2, several.is_sure)


def _percent(rate: float, low: float | None, high: float | None) -> str:
    text = f"{100 * rate:.0f}"
    return text if low is None or high is None else f"{text} [{100 * low:.0f}, {100 * high:.0f}]"


def mean_cells(means: Sequence[Mean], *, signed: bool = False) -> list[str | None]:
    """``0.812 ±0.021``, with the same decimals in the whole column; None where there is no value."""
    largest = max((abs(mean.mean) for mean in means if math.isfinite(mean.mean)), default=0.0)
    decimals = 1 if largest >= 10 else 2 if largest > 1 else 3
    cells: list[str | None] = []
    for mean in means:
        if math.isnan(mean.mean):
            cells.append(None)
            continue
        text = f"{mean.mean:{'+' if signed else ''}.{decimals}f}".replace("-", "−")
        if mean.high is not None:
            text += f" ±{mean.high - mean.mean:.{decimals}f}"
        cells.append(text)
    return cells


def interval_note(estimates: Sequence[WinRate | Mean]) -> str:
    """A sentence on what the intervals are, or why some are missing."""
    reasons = list(dict.fromkeys(estimate.note for estimate in estimates if estimate.note and estimate.seeds))
    seeds = sorted({estimate.seeds for estimate in estimates if estimate.low is not None})
    note = ""
    if seeds:
        span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        note = f"95 % intervals over {span} seeds, each comparison by itself. "
    return (note + ("No interval: " + ", ".join(reasons) + "." if reasons else "")).strip()


def many_note(rates: Sequence[ArmWinRate]) -> str:
    """A sentence on the star; empty without intervals."""
    count = max((rate.adjusted.comparisons for rate in rates), default=0)
    return f"A star: sure among all {count} comparisons of the table (Holm, 5 %). " if count > 1 else ""
