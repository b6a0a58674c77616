"""Accuracy of a reward model on preference benchmarks, by subset: chosen responses against rejected ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrm.evaluation.ranking import length_correlation, wilson_interval
from jaxrm.evaluation.reliability import measure_reliability

_MATCHED = 0.1  # of the longer text: lengths that differ by no more are alike


@dataclass(frozen=True)
class ScoredChoice:
    """The rewards of a record.

    Attributes:
      subset: of the benchmark.
      chosen: rewards of the good responses, at least one.
      rejected: rewards of the bad ones, at least one.
      chosen_lengths: words of the good responses.
      rejected_lengths: words of the bad ones.
    """

    subset: str
    chosen: Sequence[float]
    rejected: Sequence[float]
    chosen_lengths: Sequence[int]
    rejected_lengths: Sequence[int]

    @property
    def credit(self) -> float:
        """1 where the best response is a chosen one; of several best ones, the share of chosen ones among them."""
        best = max(*self.chosen, *self.rejected)
        num_chosen = sum(reward == best for reward in self.chosen)
        return num_chosen / (num_chosen + sum(reward == best for reward in self.rejected))

    @property
    def is_tie(self) -> bool:
        """Whether a chosen and a rejected response are the best ones together."""
        return max(self.chosen) == max(self.rejected)

    @property
    def margin(self) -> float:
        """How far the best chosen response is above the best rejected one."""
        return max(self.chosen) - max(self.rejected)

    @property
    def is_length_matched(self) -> bool:
        """Whether the mean lengths of both sides are alike."""
        a, b = np.mean(self.chosen_lengths), np.mean(self.rejected_lengths)
        return bool(abs(a - b) <= _MATCHED * max(a, b))


@dataclass(frozen=True)
class BenchmarkRow:
    """What a subset comes to.

    Attributes:
      subset: its name; ``all`` for all records, ``mean`` for the mean over subsets.
      records: in it.
      accuracy: mean credit.
      low: lower end of its 95 % Wilson interval; None of a mean over subsets.
      high: upper end.
      ties: share of ties.
      calibration_error: expected calibration error of ``σ(margin)``, see `jaxrm.evaluation.reliability`.
      length_correlation: Pearson correlation of reward and words over all responses; None where one does not vary.
      matched: accuracy of the records whose sides are of about the same length; None without any.
      num_matched: how many these are.
    """

    subset: str
    records: int
    accuracy: float
    low: float | None
    high: float | None
    ties: float
    calibration_error: float
    length_correlation: float | None
    matched: float | None
    num_matched: int


def benchmark_rows(records: Sequence[ScoredChoice]) -> list[BenchmarkRow]:
    """A row for each subset in the order of the file, one for all records, and the mean over subsets.

    With one subset, or none, there is the row of all records alone.
    """
    by_subset: dict[str, list[ScoredChoice]] = {}
    for record in records:
        by_subset.setdefault(record.subset, []).append(record)
    every = _row("all", records)
    if len(by_subset) < 2:
        return [every]
    rows = [_row(name, part) for name, part in by_subset.items()]
    mean = float(np.mean([row.accuracy for row in rows]))
    ties, errors = np.mean([row.ties for row in rows]), np.mean([row.calibration_error for row in rows])
    return [
        *rows,
        every,
        BenchmarkRow("mean", len(records), mean, None, None, float(ties), float(errors), None, None, 0),
    ]


def _row(subset: str, records: Sequence[ScoredChoice]) -> BenchmarkRow:
    credits = [record.credit for record in records]
    rewards = [reward for record in records for reward in (*record.chosen, *record.rejected)]
    lengths = [words for record in records for words in (*record.chosen_lengths, *record.rejected_lengths)]
    matched = [record.credit for record in records if record.is_length_matched]
    return BenchmarkRow(
        subset,
        len(records),
        float(np.mean(credits)),
        *wilson_interval(sum(credits), len(credits)),
        float(np.mean([record.is_tie for record in records])),
        measure_reliability([record.margin for record in records]).expected_calibration_error,
        length_correlation(rewards, lengths),
        float(np.mean(matched)) if matched else None,
        len(matched),
    )
