"""Choose settings from their scores: a grid first, extended while the best setting lies at its edge."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Setting = tuple[tuple[str, float], ...]
"""Values of the tuned fields, by dotted name."""

Grid = Sequence[tuple[str, Sequence[float]]]
"""The tuned fields, each with its values, ascending."""


@dataclass(frozen=True)
class Choice:
    """The state of tuning an arm in a world.

    Attributes:
      scores: mean score of each setting that was tried.
      chosen: the best setting; None while some are still to be tried, or where all failed.
      at_edge: whether the best setting lies at an end of what was tried, although the grid was extended.
      wanted: settings to try next.
    """

    scores: Mapping[Setting, float]
    chosen: Setting | None
    at_edge: bool = False
    wanted: tuple[Setting, ...] = ()


def choose(grid: Grid, scores: Mapping[Setting, float], *, extensions: int, tolerance: float = 0.0) -> Choice:
    """Choose a setting, or name those to try next.

    The whole grid is tried first. While the best setting lies at an end of an axis, the axis is extended there.

    Scores are noisy, and a much worse setting may lie next to a good one. So among the settings whose scores lie
    within ``tolerance`` of the best, the one that moves the policy least is chosen: the one with the highest
    coefficients, then with the lowest learning rate (jaxrm choice).

    Args:
      grid: fields and their values.
      scores: of the settings tried so far; NaN where a run failed.
      extensions: most values beyond either end of an axis; each is as far from the last as the grid's values are.
      tolerance: scores that are no further apart count as equal.
    """
    names = [name for name, _ in grid]
    settings = [tuple(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in grid))]
    untried = tuple(setting for setting in settings if setting not in scores)
    if untried:
        return Choice(scores, None, wanted=untried)
    valid = {setting: score for setting, score in scores.items() if not math.isnan(score)}
    if not valid:
        return Choice(scores, None)
    best = max(valid, key=lambda setting: valid[setting])
    wanted, at_edge = _beyond(grid, best, scores, extensions)
    if wanted:
        return Choice(scores, None, wanted=tuple(wanted))
    nearly_best = [setting for setting, score in valid.items() if score >= valid[best] - tolerance]
    return Choice(scores, max(nearly_best, key=_mildness), at_edge)


def setting_name(setting: Setting) -> str:
    """A setting as the name of a folder: ``kl_coef=0.05,lr=0.0003``; ``plain`` where nothing is tuned."""
    return ",".join(f"{name.rsplit('.', 1)[-1]}={value:g}" for name, value in setting) or "plain"


def _beyond(grid: Grid, best: Setting, scores: Mapping[Setting, float], extensions: int) -> tuple[list[Setting], bool]:
    """Settings beyond the ends of axes at which the best one lies, and whether one of them would be too far."""
    wanted: list[Setting] = []
    at_edge = False
    for axis, (name, values) in enumerate(grid):
        ratio = values[-1] / values[-2] if len(values) > 1 else math.sqrt(10)
        rest = best[:axis] + best[axis + 1 :]
        tried = [dict(s)[name] for s in scores if s[:axis] + s[axis + 1 :] == rest]
        value = best[axis][1]
        for is_end, end, step in (
            (value == min(tried), values[0], 1 / ratio),
            (value == max(tried), values[-1], ratio),
        ):
            if not is_end:
                continue
            beyond = float(f"{value * step:.3g}")
            if abs(math.log(beyond / end) / math.log(ratio)) <= extensions + 0.5:
                wanted.append((*best[:axis], (name, beyond), *best[axis + 1 :]))
            else:
                at_edge = True
    return wanted, at_edge


def _mildness(setting: Setting) -> tuple[float, ...]:
    """Sort key, higher for settings that move the policy less: high coefficients, low learning rates."""
    return tuple(-value if name.endswith(".lr") else value for name, value in setting)
