"""Tables of a study: who wins by each protocol, what wrong settings cost, and what policies do."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxrm.evaluation.win_rate import Mean, mean_interval
from jaxrm.reports.report import Table
from jaxrm.study.arms import in_order
from jaxrm.study.config import BEST
from jaxrm.study.intervals import (
    WIN_RATE_NOTE,
    adjusted_cell,
    interval_note,
    many_note,
    mean_cells,
    win_rate_cell,
)
from jaxrm.study.readings import PROTOCOLS, blind_choice, read
from jaxrm.study.results import SPLIT_NAMES, SPLITS, Policy, Results
from jaxrm.study.win_rates import ALL_WORLDS, OPPONENTS, ArmWinRate, select
from jaxrm.study.worlds import bias_of, task_of

_SAMPLED = "sampled"
_PROTOCOL_NOTE = (
    "published: the setting of the template. blind: the highest held-out reward at a KL of at most {kl:g} nats. "
    "oracle: the highest judge score on prompts of their own, which no user has. best checkpoint: the same along "
    "training. mean: every setting of the grid alike. worst: the lowest judge score. "
)


def protocol_note(results: Results) -> str:
    """What the protocols are, in a line."""
    return _PROTOCOL_NOTE.format(kl=results.blind_kl)


def win_rate_tables(results: Results, rates: Sequence[ArmWinRate]) -> list[Table]:
    """Arm by protocol, for each opponent, split and decoding; the most important ones first and unfolded."""
    worlds = sorted({rate.world for rate in rates}, key=lambda world: (world != ALL_WORLDS, world))
    tables = []
    for opponent in OPPONENTS:
        for world in worlds:
            for decoding in (_SAMPLED, "greedy"):
                for split in SPLITS:
                    shown = select(rates, world=world, split=split, decoding=decoding, opponent=opponent)
                    if shown and _is_shown(opponent, world == worlds[0], decoding):
                        is_first = opponent == OPPONENTS[0] and world == worlds[0] and decoding == _SAMPLED
                        title = f"{world}: win rate against {opponent}, {SPLIT_NAMES[split]}, {decoding}"
                        note = WIN_RATE_NOTE + protocol_note(results) if is_first else WIN_RATE_NOTE
                        tables.append(_by_protocol(title, shown, note, is_folded=not is_first))
    return tables


def _is_shown(opponent: str, is_pooled: bool, decoding: str) -> bool:
    """The page has the more important tables; ``win_rates.jsonl`` has the others too."""
    if decoding == _SAMPLED:
        return is_pooled or opponent in OPPONENTS[:2]
    return is_pooled and opponent == OPPONENTS[0]


def adjusted_tables(rates: Sequence[ArmWinRate]) -> list[Table]:
    """The first tables again, with intervals that hold for all of their comparisons together."""
    tables = []
    for split in SPLITS:
        shown = select(rates, split=split, decoding=_SAMPLED, opponent=OPPONENTS[0])
        worlds = [rate.world for rate in shown]
        for world in (ALL_WORLDS,) if ALL_WORLDS in worlds else tuple(dict.fromkeys(worlds)):
            here = select(shown, world=world)
            count = max((rate.adjusted.comparisons for rate in here), default=0)
            if count > 1:
                title = f"{world}: win rate against {OPPONENTS[0]}, {SPLIT_NAMES[split]}, adjusted"
                note = f"95 % intervals that hold for all {count} comparisons together (Bonferroni)."
                tables.append(_by_protocol(title, here, note, is_folded=True, is_adjusted=True))
    return tables


def _by_protocol(
    title: str, rates: Sequence[ArmWinRate], note: str, *, is_folded: bool, is_adjusted: bool = False
) -> Table:
    by_cell = {(rate.arm, rate.protocol): rate for rate in rates}
    protocols = [protocol for protocol in PROTOCOLS if any(rate.protocol == protocol for rate in rates)]
    cell = adjusted_cell if is_adjusted else win_rate_cell
    rows = [
        (arm, *(cell(by_cell.get((arm, protocol))) for protocol in protocols))
        for arm in in_order({rate.arm for rate in rates})
    ]
    if not is_adjusted:
        note += many_note(rates) + interval_note([rate.rate for rate in rates])
    return Table(title, ("arm", *protocols), tuple(rows), note, is_folded)


def settings_tables(results: Results) -> list[Table]:
    """What a wrong setting costs: the judge's mark of every arm by protocol, over all worlds and in each."""
    tables = []
    pooled = [ALL_WORLDS] if len(results.worlds) > 1 and not results.has_biases else []
    for world in (*pooled, *results.worlds):
        for split in SPLITS:
            columns = {
                protocol: [reading_mean(results, protocol, world, arm, split, "judge") for arm in results.arms]
                for protocol in PROTOCOLS
            }
            means = [mean for column in columns.values() for mean in column if mean.seeds]
            if not means:
                continue
            cells = [mean_cells(column) for column in columns.values()]
            title = f"{world}: the judge's mark by protocol, {SPLIT_NAMES[split]}, sampled"
            rows = tuple(zip(results.arms, *cells, strict=True))
            note = "Means over the answers to the test prompts. " + interval_note(means)
            is_first = split == SPLITS[0] and not results.has_biases
            tables.append(Table(title, ("arm", *PROTOCOLS), rows, note, is_folded=not is_first))
    return tables


def behavior_tables(results: Results, protocol: str) -> list[Table]:
    """What the policies of a protocol do: marks, refusals, length and KL, in each world and split."""
    tables = []
    for world in results.worlds:
        for split in SPLITS:
            names = {"judge": "judge", "KL": "kl", "length": "length"} | {n: n for n in results.behaviors(world)}
            columns = {
                title: [reading_mean(results, protocol, world, arm, split, name) for arm in results.arms]
                for title, name in names.items()
            }
            means = [mean for column in columns.values() for mean in column if mean.seeds]
            cells = {title: mean_cells(column) for title, column in columns.items()}
            cells = {title: column for title, column in cells.items() if any(column)}
            if not cells:
                continue
            note = "KL from the SFT policy in nats a response, length in tokens; each behavior over the prompts that "
            note += "it applies to. " + interval_note(means)
            title = f"{world}: what the policies do, {protocol}, {SPLIT_NAMES[split]}, sampled"
            rows = tuple(zip(results.arms, *cells.values(), strict=True))
            is_first = protocol == "published" and split == SPLITS[0] and not results.has_biases
            tables.append(Table(title, ("arm", *cells), rows, note, is_folded=not is_first))
    return tables


def reading_mean(results: Results, protocol: str, world: str, arm: str, split: str, name: str) -> Mean:
    """The mean of a field or behavior over sampled answers, over the seeds of a reading, and over `ALL_WORLDS`."""
    worlds = results.worlds if world == ALL_WORLDS else [world]
    groups = [read(results, protocol, each, arm) for each in worlds]
    if not all(groups):
        return mean_interval([])
    return mean_interval(*([_values(policies, split, name) for policies in chosen.values()] for chosen in groups))


def _values(policies: Sequence[Policy], split: str, name: str) -> np.ndarray:
    """``[P]`` values of one seed, over all policies of its reading."""
    values = [
        policy.answers[split, _SAMPLED].values(name) for policy in policies if (split, _SAMPLED) in policy.answers
    ]
    return np.concatenate(values) if values else np.array([np.nan])


def bias_tables(results: Results) -> list[Table]:
    """How biased an annotator may be: marks by bias, as published."""
    tables = []
    for task in dict.fromkeys(map(task_of, results.worlds)) if results.has_biases else ():
        worlds = sorted((world for world in results.worlds if task_of(world) == task), key=bias_of)
        for split in SPLITS:
            columns = [
                [reading_mean(results, "published", world, arm, split, "judge") for arm in results.arms]
                for world in worlds
            ]
            cells = [mean_cells(column) for column in columns]
            title = f"{task}: the judge's mark by the annotator's bias, published, {SPLIT_NAMES[split]}"
            head = ("arm", *(f"bias {bias_of(world):g}" for world in worlds))
            note = interval_note([mean for column in columns for mean in column if mean.seeds])
            tables.append(Table(title, head, tuple(zip(results.arms, *cells, strict=True)), note))
    return tables


def blind_table(results: Results) -> list[Table]:
    """How the blind choice depends on the KL that is allowed."""
    limits = (0.5, 1.0, 2.0, 5.0, 10.0, math.inf)
    rows: list[tuple[Any, ...]] = []
    means: list[Mean] = []
    for world in results.worlds:
        for arm in results.rewarded_arms:
            by_limit = [_blind_mean(results, world, arm, limit) for limit in limits]
            if any(mean.seeds for mean in by_limit):
                means += by_limit
                rows.append((f"{world}, {arm}", *mean_cells(by_limit)))
    columns = ("arm", *("any KL" if math.isinf(limit) else f"KL ≤ {limit:g}" for limit in limits))
    note = "The judge's mark, in distribution, of the setting with the highest held-out reward within a KL. "
    title = "Chosen blind: how much KL to allow"
    return [Table(title, columns, tuple(rows), note + interval_note(means), is_folded=True)] if rows else []


def _blind_mean(results: Results, world: str, arm: str, limit: float) -> Mean:
    values = []
    for seed, policies in results.policies_of(world, arm).items():
        finals = [policy for policy in policies if policy.key.setting != BEST]
        if (world, arm, seed) in results.complete and finals:
            values.append(_values([blind_choice(finals, limit)], SPLITS[0], "judge"))
    return mean_interval(values)


def choices_table(results: Results) -> list[Table]:
    """The settings that each protocol chose, with the seeds that they were chosen for."""
    rows = []
    for world in results.worlds:
        for arm in results.arms:
            cells = [_chosen(results, protocol, world, arm) for protocol in ("blind", "oracle", "worst")]
            if any(cells) and set(cells) != {"plain"}:
                rows.append((f"{world}, {arm}", *cells))
    columns = ("arm", "blind", "oracle", "worst")
    note = "In brackets the number of seeds, where they differ."
    return [Table("Settings chosen", columns, tuple(rows), note, is_folded=True)] if rows else []


def _chosen(results: Results, protocol: str, world: str, arm: str) -> str:
    counts: dict[str, int] = {}
    for policies in read(results, protocol, world, arm).values():
        for policy in policies:
            counts[policy.key.setting] = counts.get(policy.key.setting, 0) + 1
    if len(counts) < 2:
        return next(iter(counts), "")
    ordered = sorted(counts, key=lambda name: -counts[name])
    return "; ".join(f"{name} ({counts[name]})" for name in ordered)


def agreement_table(results: Results) -> list[Table]:
    """How reward models rank held-out pairs, and what the corrections of seq2seq ones gain."""
    by_kind: dict[tuple[str, str, str], list[Any]] = {}
    for row in results.agreement:
        by_kind.setdefault((row["world"], row["rm"], row["kind"]), []).append(row)
    order = in_order({f"ppo_{kind}" for *_, kind in by_kind})
    names = sorted(by_kind, key=lambda name: (*name[:2], order.index(f"ppo_{name[2]}")))
    means = {
        field: [mean_interval([[float(row.get(field, math.nan))] for row in by_kind[name]]) for name in names]
        for field in ("judge", "sum", "mean")
    }
    gains = {side: [mean_interval([[_gain(row, side)] for row in by_kind[n]]) for n in names] for side in _SIDES}
    columns = [mean_cells(column) for column in means.values()]
    columns += [mean_cells(column, signed=True) for column in gains.values()]
    rows = [(", ".join(name), *cells) for name, *cells in zip(names, *columns, strict=True)]
    note = (
        "Share of held-out pairs in which the response with the higher judge score has the higher centered sum of "
        "rewards; then in which the one that the annotator chose has the higher centered sum, or the higher mean. "
        "What the model's own correction gains over a rejected and over a chosen response, of the judge's 1. "
    )
    head = ("reward model", "as the judge", "as labeled", "as labeled, by mean", *(f"gain on {x}" for x in _SIDES))
    title = "Reward models: pairs ranked right, and corrections"
    return [Table(title, head, tuple(rows), note + interval_note(means["sum"]))] if rows else []


_SIDES = ("rejected", "chosen")


def _gain(row: Any, side: str) -> float:
    gain = row.get("corrections", {}).get(side, {}).get("judge_gain")
    return math.nan if gain is None else float(gain)


def missing_table(results: Results) -> list[Table]:
    """What an unfinished study lacks."""
    rows = tuple(_missing_rows(results))
    columns = ("arm", "seeds that are missing", "seeds that are there")
    return [Table("Not there yet", columns, rows, "The same command continues the study.")] if rows else []


AFTER_FAILURES = "The same command tries them again. Until they are done, their seeds count as published only."
"""What becomes of runs that failed, for the page and the console."""


def failed_table(results: Results) -> list[Table]:
    """The runs that failed, for the page; the console has no room for their names in a table."""
    columns = ("run", "error", "its output")
    return [Table("Failed", columns, tuple(results.failed), AFTER_FAILURES)] if results.failed else []


def _missing_rows(results: Results) -> Iterator[tuple[Any, ...]]:
    for (world, arm), seeds in sorted(results.missing.items(), key=lambda item: item[0][0]):
        there = [seed for seed in results.policies_of(world, arm) if seed not in seeds]
        yield (f"{world}, {arm}", ", ".join(map(str, sorted(seeds))), len(there))
