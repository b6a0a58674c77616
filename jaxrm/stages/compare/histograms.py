"""Histograms of the lengths of answers."""

import itertools
from collections.abc import Mapping

import numpy as np

from jaxrm.reports.charts import Curves, Series, number_text
from jaxrm.stages.compare.answers import Answers
from jaxrm.stages.compare.measures import lengths_of

_MOST_BINS = 25


def length_histograms(answers: Answers) -> list[Curves]:
    """Lengths of the answers of each policy, one chart a set and decoding; charts of one set share their bins."""
    charts = []
    for prompts in dict.fromkeys(key.prompts for key in answers):
        decodings = dict.fromkeys(key.decoding for key in answers if key.prompts == prompts)
        lengths = {decoding: _lengths(answers, prompts, decoding) for decoding in decodings}
        longest = max(int(each.max()) for by_policy in lengths.values() for each in by_policy.values())
        charts += [_chart(prompts, decoding, by_policy, longest) for decoding, by_policy in lengths.items()]
    return charts


def _lengths(answers: Answers, prompts: str, decoding: str) -> dict[str, np.ndarray]:
    """Words of the answers of each policy, of all its runs together."""
    keys = [key for key in answers if (key.prompts, key.decoding) == (prompts, decoding)]
    return {
        policy: np.concatenate([lengths_of(answers[key]) for key in keys if key.policy == policy])
        for policy in dict.fromkeys(key.policy for key in keys)
    }


def _chart(prompts: str, decoding: str, lengths: Mapping[str, np.ndarray], longest: int) -> Curves:
    width = _bin_width(longest)
    starts = np.arange(0, longest + 1, width)
    middles = tuple(float(start) + (width - 1) / 2 for start in starts)
    series = []
    for policy, each in lengths.items():
        counts = np.bincount(each.astype(int) // width, minlength=len(starts))
        shares = tuple(map(float, 100 * counts / len(each)))
        series.append(Series(policy, middles, shares, f"mean {number_text(each.mean(), 1)}"))
    note = f"Bins of {width} {'word' if width == 1 else 'words'}. Point at one for the shares of it."
    return Curves(
        f"Lengths, {prompts}, {decoding}",
        f"words of an answer ({prompts})",
        "% of the answers",
        tuple(series),
        note,
        bin_width=width,
    )


def _bin_width(longest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, … words with which the bins are not too many."""
    widths = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return next(width for width in widths if longest // width < _MOST_BINS)
