"""Accuracy by subset, against hand-worked cases."""

import pytest

from jaxrm.evaluation.benchmark import ScoredChoice, benchmark_rows


def choice(subset, chosen, rejected, lengths=(3, 3)):
    return ScoredChoice(subset, chosen, rejected, [lengths[0]] * len(chosen), [lengths[1]] * len(rejected))


def test_credit_is_shared_among_the_best():
    """One good answer of four, as in RewardBench 2; a tie with two bad ones is worth a third."""
    assert choice("a", [2.0], [1.0, 0.0, -1.0]).credit == 1
    assert choice("a", [1.0], [1.0, 1.0, 0.0]).credit == pytest.approx(1 / 3)
    assert choice("a", [0.5, 2.0], [2.0, 1.0]).credit == 0.5
    assert choice("a", [0.0], [1.0]).credit == 0


def test_rows_are_of_subsets_of_all_and_their_mean():
    """The mean over subsets weighs each alike; records of equal length are counted apart."""
    records = [choice("easy", [1.0], [0.0]) for _ in range(3)]
    records += [choice("hard", [0.0], [1.0], (3, 9)), choice("hard", [1.0], [1.0], (10, 11))]
    easy, hard, every, mean = benchmark_rows(records)
    assert [row.subset for row in (easy, hard, every, mean)] == ["easy", "hard", "all", "mean"]
    assert (easy.accuracy, hard.accuracy, every.accuracy, mean.accuracy) == (1.0, 0.25, 3.5 / 5, 0.625)
    assert (hard.ties, every.ties) == (0.5, 0.2) and easy.low < 1 == easy.high
    assert (hard.matched, hard.num_matched, every.num_matched) == (0.5, 1, 4)
    assert mean.low is None and easy.length_correlation is None


def test_a_file_without_subsets_has_one_row():
    (row,) = benchmark_rows([choice("", [1.0], [0.0])])
    assert (row.subset, row.records, row.accuracy) == ("all", 1, 1.0)
