"""Choosing the values of what is tuned, from scores: a grid, and on from it while the best lies at its edge."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Setting = tuple[tuple[str, float], ...]
"""Values of the fields that are tuned, by dotted name."""

Grid = Sequence[tuple[str, Sequence[float]]]
"""Fields that are tuned, each with its values, ascending."""


@dataclass(frozen=True)
class Choice:
    """What came of choosing the settings of an arm in a world.

    Attributes:
      scores: mean score of each setting that was tried.
      chosen: the best one; None while there are settings to be tried, or where all failed.
      at_edge: whether the best one lies at an end of what was tried, although the grid was extended.
      wanted: settings to be tried now.
    """

    scores: Mapping[Setting, float]
    chosen: Setting | None
    at_edge: bool = False
    wanted: tuple[Setting, ...] = ()


def choose(grid: Grid, scores: Mapping[Setting, float], *, extensions: int, tolerance: float = 0.0) -> Choice:
    """Go through a grid, and on along the lines through its best point while that lies at an end of one.

    Scores are noisy, and beside a high one there may be a cliff. So of those settings whose scores lie within
    ``tolerance`` of the best, the one that moves the policy least is chosen: with the highest coefficients, then the
    lowest learning rate.

    Args:
      grid: fields and their values.
      scores: of the settings tried so far; NaN where a run failed.
      extensions: most values beyond either end of an axis; each is as far from the last as the grid's values are.
      tolerance: of the scores.
    """
    names = [name for name, _ in grid]
    first = [tuple(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in grid))]
    missing = tuple(setting for setting in first if setting not in scores)
    if missing:
        return Choice(scores, None, wanted=missing)
    sound = {setting: score for setting, score in scores.items() if not math.isnan(score)}
    if not sound:
        return Choice(scores, None)
    best = max(sound, key=lambda setting: sound[setting])
    wanted, at_edge = _beyond(grid, best, scores, extensions)
    if wanted:
        return Choice(scores, None, wanted=tuple(wanted))
    near = [setting for setting, score in sound.items() if score >= sound[best] - tolerance]
    return Choice(scores, max(near, key=_mildness), at_edge)


def setting_name(setting: Setting) -> str:
    """A setting as the name of a folder: ``kl_coef=0.05,lr=0.0003``; ``plain`` where nothing is tuned."""
    return ",".join(f"{name.rsplit('.', 1)[-1]}={value:g}" for name, value in setting) or "plain"


def _beyond(grid: Grid, best: Setting, scores: Mapping[Setting, float], extensions: int) -> tuple[list[Setting], bool]:
    """Settings next to the best one where it is the last on its line, and whether one of them would be too far."""
    wanted: list[Setting] = []
    at_edge = False
    for place, (name, values) in enumerate(grid):
        ratio = values[-1] / values[-2] if len(values) > 1 else math.sqrt(10)
        rest = best[:place] + best[place + 1 :]
        on_line = [dict(s)[name] for s in scores if s[:place] + s[place + 1 :] == rest]
        value = best[place][1]
        for is_end, end, step in (
            (value == min(on_line), values[0], 1 / ratio),
            (value == max(on_line), values[-1], ratio),
        ):
            if not is_end:
                continue
            beyond = float(f"{value * step:.3g}")
            if abs(math.log(beyond / end) / math.log(ratio)) <= extensions + 0.5:
                wanted.append((*best[:place], (name, beyond), *best[place + 1 :]))
            else:
                at_edge = True
    return wanted, at_edge


def _mildness(setting: Setting) -> tuple[float, ...]:
    return tuple(-value if name.endswith(".lr") else value for name, value in setting)
