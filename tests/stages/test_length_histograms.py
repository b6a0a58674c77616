"""Histograms of answers: bins of whole words, and what stands beside the names of policies."""

import numpy as np
import pytest

from jaxrm.stages.compare.answers import AnswerKey
from jaxrm.stages.compare.histograms import length_histograms


def answers(*lengths):
    return [{"response": " ".join(["word"] * length)} for length in lengths]


def test_runs_of_a_policy_are_counted_together():
    sft = {AnswerKey("sft", run, "plain", "greedy"): answers(*lengths) for run, lengths in enumerate([(0, 2), (2, 4)])}
    (chart,) = length_histograms({**sft, AnswerKey("ppo", 0, "plain", "greedy"): answers(3)})
    one, other = chart.series
    assert chart.bin_width == 1 and one.x == other.x == (0, 1, 2, 3, 4)
    assert one.y == (25, 0, 50, 0, 25) and other.y == (0, 0, 0, 100, 0)
    assert (one.summary, other.summary) == ("mean 2.0", "mean 3.0")


@pytest.mark.parametrize(("longest", "width"), [(0, 1), (24, 1), (25, 2), (124, 5), (125, 10), (1249, 50)])
def test_every_answer_is_in_a_bin_of_whole_words(longest, width):
    lengths = np.random.default_rng(0).integers(0, longest + 1, 500).tolist()
    (chart,) = length_histograms({AnswerKey("sft", 0, "plain", "greedy"): answers(*lengths, longest)})
    (series,) = chart.series
    assert chart.bin_width == width and len(series.x) <= 25
    shares = [np.mean([abs(length - x) < width / 2 for length in (*lengths, longest)]) for x in series.x]
    np.testing.assert_allclose(series.y, 100 * np.array(shares))
    assert sum(series.y) == pytest.approx(100)


def test_charts_of_one_set_of_prompts_share_their_bins():
    keys = [AnswerKey("sft", 0, *each) for each in (("plain", "greedy"), ("plain", "sampled"), ("harmful", "greedy"))]
    lengths = dict(zip(keys, (answers(3), answers(100), answers(5)), strict=True))
    greedy, sampled, harmful = length_histograms(lengths)
    assert greedy.series[0].x == sampled.series[0].x and greedy.x_label == sampled.x_label
    assert harmful.bin_width == 1 and harmful.x_label != greedy.x_label  # so neither is read at a place of the other
