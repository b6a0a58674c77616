"""Quality of the corrections that a seq2seq reward model writes."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Scripts written without spaces between words: each character is a word of its own.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


@dataclass(frozen=True)
class CorrectionQuality:
    """Means over responses, before and after correction.

    Attributes:
      changed: share of corrections that differ from their source.
      distance_to_source: tokens to edit to turn the source into the correction.
      distance_to_chosen: tokens to edit to turn the correction into the chosen response.
      source_to_chosen: the same for the uncorrected source; a correction that helps is nearer.
      rouge_l_to_chosen: ROUGE-L F1 of the correction against the chosen response.
      source_rouge_l: the same for the uncorrected source.
      judge_gain: the judge's score of the correction less that of its source; None where there is no judge.
      n: responses.
    """

    changed: float
    distance_to_source: float
    distance_to_chosen: float
    source_to_chosen: float
    rouge_l_to_chosen: float
    source_rouge_l: float
    judge_gain: float | None
    n: int


def edit_distance(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Levenshtein distance in tokens: the fewest insertions, deletions and substitutions that turn `a` into `b`.

    Args:
      a: ``[n]`` token ids.
      b: ``[m]`` token ids.
    """
    from rapidfuzz.distance import Levenshtein

    return int(Levenshtein.distance([int(token) for token in a], [int(token) for token in b]))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 of two texts: twice their longest common subsequence over the sum of their lengths, in words.

    The count is `rouge_score`'s, without stemming. Its own words are of a–z and 0–9, so text in any other script would
    score 0. Here letters and digits of every script make words (jaxrm choice), which is the same on ASCII text.

    Returns:
      0 to 1; 0 where either text has no word.

    Source: C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries" (2004).
    """
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].fmeasure)


def correction_quality(
    sources: Sequence[Sequence[int] | np.ndarray],
    corrections: Sequence[Sequence[int] | np.ndarray],
    chosen: Sequence[Sequence[int] | np.ndarray],
    *,
    source_texts: Sequence[str],
    correction_texts: Sequence[str],
    chosen_texts: Sequence[str],
    judge_gains: Sequence[float] | None,
) -> CorrectionQuality:
    """Compare corrections with their sources and with the chosen responses.

    Ids are compared as given: let all three end with their end token, or none.

    Args:
      sources: ids of the responses to correct, usually the rejected ones; at least one.
      corrections: ids that the reward model wrote, one sequence for each source.
      chosen: ids of the chosen responses of the same pairs.
      source_texts: text of each source.
      correction_texts: text of each correction.
      chosen_texts: text of each chosen response.
      judge_gains: an exact judge's score of each correction less that of its source, or None.
    """
    n = len(sources)
    assert n > 0, "no responses"
    others = (corrections, chosen, source_texts, correction_texts, chosen_texts)
    assert all(len(values) == n for values in others), (n, *map(len, others))
    assert judge_gains is None or len(judge_gains) == n, "judge_gains is of another length"
    to_source = [edit_distance(*pair) for pair in zip(sources, corrections, strict=True)]
    return CorrectionQuality(
        changed=_mean([distance > 0 for distance in to_source]),
        distance_to_source=_mean(to_source),
        distance_to_chosen=_mean([edit_distance(*pair) for pair in zip(corrections, chosen, strict=True)]),
        source_to_chosen=_mean([edit_distance(*pair) for pair in zip(sources, chosen, strict=True)]),
        rouge_l_to_chosen=_mean([rouge_l(*pair) for pair in zip(correction_texts, chosen_texts, strict=True)]),
        source_rouge_l=_mean([rouge_l(*pair) for pair in zip(source_texts, chosen_texts, strict=True)]),
        judge_gain=None if judge_gains is None else _mean(judge_gains),
        n=n,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(np.asarray(values, np.float64)))


class _Words:
    """The word rule, in the form that `rouge_score` asks for."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
