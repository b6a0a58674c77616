"""Cells and notes of tables for win rates and means with intervals."""

import math
from collections.abc import Sequence

from jaxrm.evaluation.win_rate import Mean, WinRate
from jaxrm.reports.report import Shaded


def win_rate_cell(rate: WinRate | None) -> Shaded | None:
    """``53 % [51, 55]``, colored by its distance from one half, bold where the interval leaves out one half."""
    if rate is None or math.isnan(rate.rate):
        return None
    text = f"{100 * rate.rate:.0f} %"
    if rate.low is not None and rate.high is not None:
        text += f" [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
    return Shaded(text, 4 * rate.rate - 2, bool(rate.verdict))  # full color at 25 % and at 75 %


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
