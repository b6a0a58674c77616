"""Win rates of every arm against a few opponents, and their tables."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxrm.evaluation.win_rate import WinRate, outcomes, win_rate
from jaxrm.reports.report import Table
from jaxrm.study.intervals import interval_note, win_rate_cell
from jaxrm.study.results import DECODINGS, SPLITS, AnswerKey, Results, are_crossed, in_order

OPPONENTS = ("ppo_scalar", "ppo_scalar_length_residual", "sft_chosen", "sft")
BASELINE = "ppo_scalar"
ALL_WORLDS = "all worlds"
SPLIT_NAMES = {"test": "in distribution", "test_ood": "out of distribution"}


class ArmWinRate(NamedTuple):
    """An arm's win rate against an opponent; `world` is `ALL_WORLDS` for the mean over the study's worlds."""

    world: str
    split: str
    decoding: str
    arm: str
    opponent: str
    rate: WinRate


def win_rates(results: Results) -> list[ArmWinRate]:
    """Every arm against every opponent, in each world and over all of them, where every world has both."""
    return [
        each
        for split in SPLITS
        for decoding in DECODINGS
        for arm in results.arms
        for opponent in OPPONENTS
        if arm != opponent
        for each in _pairing(results, split, decoding, arm, opponent)
    ]


def _pairing(results: Results, split: str, decoding: str, arm: str, opponent: str) -> list[ArmWinRate]:
    """One arm against one opponent."""
    worlds = sorted({key.world for key in results.answers})
    groups = {}
    for world in worlds:
        pairs = results.pairs(AnswerKey(world, arm, split, decoding), opponent)
        if pairs:
            wins = [outcomes(answers.judge, opposing.judge) for answers, opposing in pairs]
            groups[world] = (wins, are_crossed([answers for answers, _ in pairs]))
    rates = [
        ArmWinRate(world, split, decoding, arm, opponent, win_rate(wins, crossed=crossed))
        for world, (wins, crossed) in groups.items()
    ]
    if len(groups) == len(worlds) > 1:
        crossed = all(crossed for _, crossed in groups.values())
        rate = win_rate(*(wins for wins, _ in groups.values()), crossed=crossed)
        rates.append(ArmWinRate(ALL_WORLDS, split, decoding, arm, opponent, rate))
    return rates


def win_rate_tables(rates: Sequence[ArmWinRate]) -> list[Table]:
    """A matrix, arm by opponent, for each split and decoding, over all worlds and then for each world."""
    worlds = sorted({each.world for each in rates}, key=lambda world: (world != ALL_WORLDS, world))
    tables = []
    for world in worlds:
        for decoding in DECODINGS:
            for split in SPLITS:
                shown = [each for each in rates if each[:3] == (world, split, decoding)]
                if shown:
                    tables.append(_matrix(f"{world}: win rate against …, {SPLIT_NAMES[split]}, {decoding}", shown))
    return tables


def _matrix(title: str, rates: Sequence[ArmWinRate]) -> Table:
    by_pairing = {(each.arm, each.opponent): each.rate for each in rates}
    opponents = [name for name in OPPONENTS if any(each.opponent == name for each in rates)]
    rows = [
        (arm, *(win_rate_cell(by_pairing.get((arm, opponent))) for opponent in opponents))
        for arm in in_order(each.arm for each in rates)
    ]
    note = "Share of prompts where the arm has the higher judge score, in percent; a tie counts half. "
    return Table(title, ("arm", *opponents), tuple(rows), note + interval_note([each.rate for each in rates]))
