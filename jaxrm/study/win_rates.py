"""Win rates of every arm against a few opponents, by protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxrm.errors import UserError
from jaxrm.evaluation.many_comparisons import Adjusted, adjusted
from jaxrm.evaluation.win_rate import WinRate, outcomes, win_rate
from jaxrm.study.arms import BASELINE, FAIR_BASELINE
from jaxrm.study.readings import PROTOCOLS, read
from jaxrm.study.results import DECODINGS, SPLITS, Policy, Results

OPPONENTS = (BASELINE, FAIR_BASELINE, "sft_chosen", "sft")
ALL_WORLDS = "all worlds"
_NONE = Adjusted(None, None, None, 0)


@dataclass(frozen=True)
class ArmWinRate:
    """An arm's win rate against an opponent.

    Attributes:
      protocol: of `jaxrm.study.readings.PROTOCOLS`; both sides are read by it.
      world: `ALL_WORLDS` for the mean over the study's worlds.
      split: of the prompts.
      decoding: of the answers.
      arm: of the study.
      opponent: of `OPPONENTS`.
      rate: the win rate.
      adjusted: the same as one of all arms and protocols against this opponent, of one world, split and decoding.
    """

    protocol: str
    world: str
    split: str
    decoding: str
    arm: str
    opponent: str
    rate: WinRate
    adjusted: Adjusted = _NONE

    def as_row(self) -> dict[str, Any]:
        """For a file of JSON lines."""
        names = ("protocol", "world", "split", "decoding", "arm", "opponent")
        row = {name: getattr(self, name) for name in names}
        row |= {name: getattr(self.rate, name) for name in ("rate", "low", "high", "seeds", "prompts", "note")}
        several = self.adjusted
        return row | {
            "adjusted_low": several.low,
            "adjusted_high": several.high,
            "holm_p": several.p,
            "comparisons": several.comparisons,
        }


def win_rates(results: Results) -> list[ArmWinRate]:
    """Every arm against every opponent by every protocol, in each world and over all that have both.

    Raises:
      UserError: two policies of a world and seed were asked different prompts.
    """
    rates: list[ArmWinRate] = []
    for split in SPLITS:
        for decoding in DECODINGS:
            for opponent in OPPONENTS:
                rates += _adjust(
                    [
                        rate
                        for protocol in PROTOCOLS
                        for arm in results.arms
                        if arm != opponent
                        for rate in _pairing(results, protocol, (split, decoding), arm, opponent)
                    ]
                )
    return rates


def _adjust(rates: Sequence[ArmWinRate]) -> list[ArmWinRate]:
    """The rates of an opponent, each as one of those of its world."""
    together = []
    for world in dict.fromkeys(rate.world for rate in rates):
        here = [rate for rate in rates if rate.world == world]
        several = adjusted([rate.rate for rate in here])
        together += [replace(rate, adjusted=one) for rate, one in zip(here, several, strict=True)]
    return together


def _pairing(results: Results, protocol: str, answered: tuple[str, str], arm: str, opponent: str) -> list[ArmWinRate]:
    """One arm against one opponent, in one split and decoding."""
    groups: dict[str, tuple[list[np.ndarray], bool]] = {}
    for world in results.worlds:
        wins, prompts = [], []
        first, second = read(results, protocol, world, arm), read(results, protocol, world, opponent)
        for seed in sorted(first.keys() & second.keys()):
            scores = _outcomes(first[seed], second[seed], answered)
            if scores is not None:
                wins.append(scores)
                prompts.append(first[seed][0].answers[answered].prompts)
        if wins:
            groups[world] = wins, all(np.array_equal(each, prompts[0]) for each in prompts)

    def row(world: str, rate: WinRate) -> ArmWinRate:
        return ArmWinRate(protocol, world, *answered, arm, opponent, rate)

    rows = [row(world, win_rate(wins, crossed=crossed)) for world, (wins, crossed) in groups.items()]
    if len(groups) == len(results.worlds) > 1 and not results.has_biases:
        crossed = all(crossed for _, crossed in groups.values())
        rows.append(row(ALL_WORLDS, win_rate(*(wins for wins, _ in groups.values()), crossed=crossed)))
    return rows


def _outcomes(first: Sequence[Policy], second: Sequence[Policy], answered: tuple[str, str]) -> np.ndarray | None:
    """``[P]`` who wins at each prompt of one seed, the mean over all pairs of policies; None without answers."""
    sides = [[policy for policy in side if answered in policy.answers] for side in (first, second)]
    if not all(sides):
        return None
    marks, prompts = zip(*(_marks(side, answered) for side in sides), strict=True)
    if not np.array_equal(*prompts):
        one, other = (side[0].key for side in sides)
        raise UserError(
            f"{one.world}, seed {one.seed}: {one.arm} and {other.arm} were asked different prompts, so they cannot "
            "be compared; the results are of two studies: remove those of one and run it again"
        )
    return np.asarray(outcomes(*np.broadcast_arrays(marks[0][:, None], marks[1][None])).mean(axis=(0, 1)))


def _marks(policies: Sequence[Policy], answered: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """``[S, P]`` judge scores of the policies of one seed, and ``[P]`` the prompts."""
    answers = [policy.answers[answered] for policy in policies]
    return np.stack([each.judge for each in answers]), answers[0].prompts


def select(rates: Sequence[ArmWinRate], **fields: str) -> list[ArmWinRate]:
    """The rates whose fields have these values, e.g. ``world="safety"``."""
    return [rate for rate in rates if all(getattr(rate, name) == value for name, value in fields.items())]
