"""What a comparison comes to: win rates, refusals, lengths and the rest, as rows of tables."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxrm.evaluation import comparison
from jaxrm.evaluation.comparison import Rate
from jaxrm.stages.compare.answers import AnswerKey, Answers
from jaxrm.stages.compare.prompts import PromptSet
from jaxrm.stages.compare.reference import ReferenceRows

Row = dict[str, Any]


@dataclass(frozen=True)
class Duel:
    """Two policies' answers to a set in a decoding, as one judge sees them.

    Attributes:
      policy: name of the first policy, whose wins are counted.
      other: name of the second.
      prompts: name of the set.
      decoding: of the answers.
      judge: name of the judge.
      outcomes: ``[S, N]`` of S runs and N prompts, see `jaxrm.evaluation.comparison`.
      position_bias: of a judge that is asked in both orders; None of one that scores.
    """

    policy: str
    other: str
    prompts: str
    decoding: str
    judge: str
    outcomes: np.ndarray
    position_bias: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All that was result.

    Attributes:
      sets: of prompts, by name.
      answers: of every policy.
      duels: verdicts.
      refused: whether each answer refuses, ``[N]``; NaN where a judge of refusals could not read it.
      reference: what the reference says of the answers.
      tables: rows by the name of the table.
    """

    sets: Mapping[str, PromptSet]
    answers: Answers
    duels: Sequence[Duel]
    refused: Mapping[AnswerKey, np.ndarray]
    reference: ReferenceRows
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)


def lengths_of(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Words of each answer ``[N]``, which mean the same whatever the policy's tokens are."""
    return np.array([len(row["response"].split()) for row in rows], np.float64)


def tables_of(result: Comparison) -> dict[str, list[Row]]:
    """Every table of a comparison: ``wins``, ``answers``, ``labels``, ``quartiles``, ``agreement``."""
    return {
        "wins": [_wins(result, duel) for duel in result.duels],
        "answers": list(_answers(result)),
        "labels": list(_labels(result)),
        "quartiles": [row for duel in result.duels for row in _quartiles(result, duel)],
        "agreement": list(_agreement(result.duels)),
    }


def duel_lengths(result: Comparison, duel: Duel) -> tuple[np.ndarray, np.ndarray]:
    """Lengths ``[S, N]`` of the first and of the second policy's answers."""

    def table(policy: str) -> np.ndarray:
        runs = range(len(duel.outcomes))
        return np.stack(
            [lengths_of(result.answers[AnswerKey(policy, run, duel.prompts, duel.decoding)]) for run in runs]
        )

    return table(duel.policy), table(duel.other)


def _wins(result: Comparison, duel: Duel) -> Row:
    verdicts = duel.outcomes[~np.isnan(duel.outcomes)]
    shares = {name: float((verdicts == value).mean()) if len(verdicts) else None for name, value in _SIDES.items()}
    rate = comparison.win_share(duel.outcomes)
    controlled = comparison.length_controlled(duel.outcomes, *duel_lengths(result, duel))
    return {
        **_names(duel),
        **shares,
        **_rate("win_rate", rate),
        **_rate("length_controlled", controlled),
        "position_bias": _number(duel.position_bias),
        "verdicts": len(verdicts),
        "without_verdict": int(np.isnan(duel.outcomes).sum()),
        "runs": len(duel.outcomes),
    }


_SIDES = {"wins": 1.0, "ties": 0.5, "losses": 0.0}


def _names(duel: Duel) -> Row:
    return {
        "policy": duel.policy,
        "against": duel.other,
        "prompts": duel.prompts,
        "decoding": duel.decoding,
        "judge": duel.judge,
    }


def _rate(name: str, rate: Rate) -> Row:
    return {name: _number(rate.rate), f"{name}_low": rate.low, f"{name}_high": rate.high}


def _answers(result: Comparison) -> Iterator[Row]:
    for policy, prompts, decoding in dict.fromkeys((key.policy, key.prompts, key.decoding) for key in result.answers):
        keys = [key for key in result.answers if (key.policy, key.prompts, key.decoding) == (policy, prompts, decoding)]
        rows = [row for key in keys for row in result.answers[key]]
        texts = [row["response"] for row in rows]
        refused = np.stack([result.refused[key] for key in keys])
        ended = [row["ended"] for row in rows if row["ended"] is not None]
        measured = [row for key in keys for row in result.reference.get(key, ())]
        kl, tokens = [row["kl"] for row in measured if row["kl"] is not None], sum(row["tokens"] for row in measured)
        yield {
            "policy": policy,
            "prompts": prompts,
            "decoding": decoding,
            **_rate("refusals", comparison.win_share(refused)),
            "words": float(lengths_of(rows).mean()),
            "distinct_2": _number(comparison.distinct(texts, 2)),
            "longest_repeat": float(np.mean([comparison.longest_repeat(text) for text in texts])),
            "ended": float(np.mean(ended)) if ended else None,
            "kl": float(np.mean(kl)) if kl else None,
            "perplexity": _number(math.exp(min(sum(row["nll"] for row in measured) / tokens, 700))) if tokens else None,
        }


def _labels(result: Comparison) -> Iterator[Row]:
    """Refusals of harmless prompts against help with harmful ones, of each policy."""
    for policy, decoding in dict.fromkeys((key.policy, key.decoding) for key in result.answers):
        row: Row = {"policy": policy, "decoding": decoding}
        for label, column in (("harmless", "refused_of_harmless"), ("harmful", "complied_of_harmful")):
            by_run: dict[int, list[np.ndarray]] = {}
            for key in result.answers:
                if (key.policy, key.decoding) == (policy, decoding) and result.sets[key.prompts].label == label:
                    by_run.setdefault(key.run, []).append(result.refused[key])
            if by_run:
                refused = np.stack([np.concatenate(sets) for sets in by_run.values()])
                row |= _rate(column, comparison.win_share(refused if label == "harmless" else 1 - refused))
        if len(row) > 2:
            yield row


def _quartiles(result: Comparison, duel: Duel) -> Iterator[Row]:
    ours, theirs = duel_lengths(result, duel)
    for number, (least, most, rate) in enumerate(comparison.by_length_quartile(duel.outcomes, ours - theirs), 1):
        yield {**_names(duel), "quarter": number, "least": least, "most": most, **_rate("win_rate", rate)}


def _agreement(duels: Sequence[Duel]) -> Iterator[Row]:
    judges = list(dict.fromkeys(duel.judge for duel in duels))
    for i, first in enumerate(judges):
        for second in judges[i + 1 :]:
            a, b = (np.concatenate([d.outcomes.ravel() for d in duels if d.judge == name]) for name in (first, second))
            share, kappa, pairs = comparison.agreement(a, b)
            yield {"judge": first, "other": second, "equal": _number(share), "kappa": _number(kappa), "pairs": pairs}


def _number(value: float | None) -> float | None:
    """A number as JSON can hold it."""
    return None if value is None or not math.isfinite(value) else float(value)
