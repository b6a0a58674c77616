"""The tables of a study: win rates, what each arm does, and what it does at equal KL."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrm.evaluation.over_optimization import at_kl, reach
from jaxrm.evaluation.win_rate import Mean, WinRate, difference_interval, mean_interval, outcomes, win_rate
from jaxrm.reports.report import Shaded, Table
from jaxrm.study.config import PPO
from jaxrm.study.results import DECODINGS, SPLITS, Answers, Cell, Results, are_crossed, in_order, number

OPPONENTS = ("ppo_scalar", "ppo_scalar_length_residual", "sft_chosen", "sft")
BASELINE = "ppo_scalar"
ALL = "all worlds"
WORDS = {"test": "in distribution", "test_ood": "out of distribution"}


class Comparison(NamedTuple):
    """An arm's win rate against an opponent; `world` is `ALL` for the mean over the study's worlds."""

    world: str
    split: str
    decoding: str
    arm: str
    opponent: str
    found: WinRate


def comparisons(results: Results) -> list[Comparison]:
    """Every arm against every opponent, in each world and over all of them, where all have both."""
    worlds = sorted({cell.world for cell in results.answers})
    found = []
    for split in SPLITS:
        for decoding in DECODINGS:
            for arm in results.arms:
                for opponent in OPPONENTS:
                    if arm == opponent:
                        continue
                    groups = {}
                    for world in worlds:
                        pairs = results.pairs(Cell(world, arm, split, decoding), opponent)
                        if pairs:
                            rows = [outcomes(a.judge, b.judge) for a, b in pairs]
                            groups[world] = (rows, are_crossed([a for a, _ in pairs]))
                    for world, (rows, crossed) in groups.items():
                        rate = win_rate(rows, crossed=crossed)
                        found.append(Comparison(world, split, decoding, arm, opponent, rate))
                    if len(groups) == len(worlds) > 1:
                        crossed = all(crossed for _, crossed in groups.values())
                        rate = win_rate(*(rows for rows, _ in groups.values()), crossed=crossed)
                        found.append(Comparison(ALL, split, decoding, arm, opponent, rate))
    return found


def win_rate_tables(found: Sequence[Comparison]) -> list[Table]:
    """A matrix, arm by opponent, for each split and decoding, over all worlds and then for each world."""
    worlds = sorted({each.world for each in found}, key=lambda world: (world != ALL, world))
    tables = []
    for world in worlds:
        for decoding in DECODINGS:
            for split in SPLITS:
                here = [each for each in found if each[:3] == (world, split, decoding)]
                if not here:
                    continue
                opponents = [name for name in OPPONENTS if any(each.opponent == name for each in here)]
                cells = {(each.arm, each.opponent): each.found for each in here}
                arms = in_order(each.arm for each in here)
                rows = [(arm, *(_win_cell(cells.get((arm, opponent))) for opponent in opponents)) for arm in arms]
                title = f"{world}: win rate against …, {WORDS[split]}, {decoding}"
                note = "Share of prompts where the arm's mark is the higher one, in percent; a tie counts half. "
                tables.append(
                    Table(title, ("arm", *opponents), tuple(rows), note + _note([each.found for each in here]))
                )
    return tables


def arm_tables(results: Results, found: Sequence[Comparison]) -> list[Table]:
    """For each world and split what the arms' sampled responses are like."""
    tables = []
    for world in results.worlds:
        for split in SPLITS:
            cells = [Cell(world, arm, split, "sampled") for arm in results.arms]
            cells = [cell for cell in cells if cell in results.answers]
            if not cells:
                continue
            wins = {
                each.arm: each.found
                for each in found
                if each[:3] == (world, split, "sampled") and each.opponent == BASELINE
            }
            columns: dict[str, list[Mean]] = {
                "judge": [_mean(results, cell, lambda answers: answers.judge) for cell in cells],
                "KL": [_mean(results, cell, lambda answers: answers.kl) for cell in cells],
                "length": [_mean(results, cell, lambda answers: answers.length) for cell in cells],
            }
            for key in results.behaviours(world):
                columns[key] = [_mean(results, cell, _behaviour_of(key)) for cell in cells]
            texts = {name: _texts(means) for name, means in columns.items()}
            texts = {name: column for name, column in texts.items() if any(column)}
            names = list(texts)
            rows = [
                (cell.arm, texts["judge"][n], _win_cell(wins.get(cell.arm)), *(texts[name][n] for name in names[1:]))
                for n, cell in enumerate(cells)
            ]
            tables.append(
                Table(
                    f"{world}: what the arms do, {WORDS[split]}, sampled",
                    ("arm", "judge", f"wins against {BASELINE}", *names[1:]),
                    tuple(rows),
                    "KL from the SFT policy in nats a response, length in tokens; each behaviour over the prompts that "
                    "it applies to. " + _note([mean for means in columns.values() for mean in means if mean.seeds]),
                )
            )
    return tables


def watched_arms(results: Results, world: str) -> list[str]:
    """The arms of which something was measured on the way; of the others only where they end."""
    curves = {arm: runs for (where, arm), runs in results.curves.items() if where == world}
    return in_order(arm for arm, runs in curves.items() if any(len(rows) > 1 for rows in runs.values()))


def equal_kl_tables(results: Results) -> list[Table]:
    """Each trained arm at the largest KL that all arms of PPO in a world reach, and at one that about half reach."""
    tables = []
    for world in results.worlds:
        arms = watched_arms(results, world)
        reaches = {arm: reach([_along(rows, "kl") for rows in results.curves[world, arm].values()]) for arm in arms}
        of_ppo = [reaches[arm] for arm in arms if arm.startswith(PPO)] or list(reaches.values())
        if not arms:
            continue
        levels = sorted({min(of_ppo), float(np.median(of_ppo))})
        tables += [_equal_kl(results, world, level, reaches) for level in levels if level > 0]
    return tables


def along_table(results: Results, paths: Callable[[str, str, str], Any]) -> list[Table]:
    """The judge along training against the reward, which shows what was over-optimised; `paths` gives mean paths."""
    rows: list[tuple[str | float | None, ...]] = []
    for world in results.worlds:
        for arm in watched_arms(results, world):
            judge, reward = paths(world, arm, "judge"), paths(world, arm, "reward")
            if not judge.steps or not np.isfinite(judge.values).any():
                continue
            best = int(np.nanargmax(judge.values))
            marks = (judge.values[0], judge.values[best], judge.kl[best], judge.values[-1], judge.kl[-1])
            paid = (reward.values[0], reward.values[-1]) if np.isfinite(reward.values).all() else (None, None)
            rows.append((f"{world}, {arm}", *marks, *paid))
    columns = ("arm", "judge at first", "best", "KL there", "last", "KL there", "reward at first", "last")
    note = "Means over the seeds of the final runs, on the selection prompts. A last mark below the best one while the "
    note += "reward rises is over-optimisation."
    return [Table("Along training", columns, tuple(rows), note)] if rows else []


def settings_table(results: Results) -> list[Table]:
    """The setting that was chosen for each arm, and whether it lies at the edge of what was tried."""
    tried: dict[tuple[str, str], dict[tuple[tuple[str, Any], ...], list[Any]]] = {}
    for row in results.selection:
        settings = tuple(sorted(row["settings"].items()))
        tried.setdefault((row["world"], row["arm"]), {}).setdefault(settings, []).append(row)
    names = sorted({name for row in results.selection for name in row["settings"]})
    rows = []
    for world in sorted({world for world, _ in tried}):
        for arm in in_order(arm for where, arm in tried if where == world):
            chosen = [found for found in tried[world, arm].values() if any(row["chosen"] for row in found)]
            for found in chosen or [[]]:
                of = dict(found[0]["settings"]) if found else {}
                score, kl = (
                    float(np.mean([number(row[name]) for row in found])) if found else None for name in ("score", "kl")
                )
                edge = ("yes" if any(row["at_edge"] for row in found) else "no") if found else "not chosen yet"
                rows.append((world, arm, *(of.get(name) for name in names), score, kl, len(tried[world, arm]), edge))
    texts = [tuple(f"{cell:g}" if isinstance(cell, float) else cell for cell in row) for row in rows]
    rounded = [(*text[: 2 + len(names)], *row[2 + len(names) :]) for text, row in zip(texts, rows, strict=True)]
    columns = ("world", "arm", *names, "score", "KL", "tried", "at the edge")
    note = "Chosen on prompts of their own, none of which is in the tables above."
    return [Table("Settings chosen for each arm", columns, tuple(rounded), note)] if rows else []


def agreement_table(results: Results) -> list[Table]:
    """The share of held-out pairs that each kind of reward ranks as the annotator labelled them."""
    by_kind: dict[tuple[str, str, str], list[Any]] = {}
    for row in results.agreement:
        by_kind.setdefault((row["world"], row["rm"], row["kind"]), []).append(row)
    names = sorted(
        by_kind,
        key=lambda name: (name[0], name[1], in_order(f"ppo_{kind}" for *_, kind in by_kind).index(f"ppo_{name[2]}")),
    )
    means = {
        way: [mean_interval([[number(row.get(way))] for row in by_kind[name]]) for name in names]
        for way in ("judge", "sum", "mean")
    }
    columns = [_texts(of_way) for of_way in means.values()]
    seeds = [len({row["seed"] for row in by_kind[name]}) for name in names]
    rows = [(*name, *cells) for name, *cells in zip(names, *columns, seeds, strict=True)]
    note = "Share of held-out pairs whose response with the higher mark of the judge has the higher centred sum of "
    note += "rewards; and of those where the one that the annotator chose has it, or the higher mean. At one half a "
    note += "reward cannot rank, and says nothing about its arm. "
    title = "Reward models: pairs ranked right"
    head = ("world", "model", "kind", "as the judge", "as labelled", "as labelled, by mean", "seeds")
    return [Table(title, head, tuple(rows), note + _note(means["sum"]))] if rows else []


def missing_table(results: Results, expected: Sequence[tuple[str, str, int]] | None) -> list[Table]:
    """What an unfinished study has not: of `expected` (world, arm, seed), or of what other arms and worlds have."""
    seeds_of: dict[tuple[str, str], set[int]] = {}
    for cell, seeds in results.answers.items():
        seeds_of.setdefault((cell.world, cell.arm), set()).update(seeds)
    if expected is None:
        known = {
            world: set().union(*(s for (where, _), s in seeds_of.items() if where == world)) for world, _ in seeds_of
        }
        expected = [(world, arm, seed) for world in known for arm in results.arms for seed in sorted(known[world])]
    absent: dict[tuple[str, str], list[int]] = {}
    for world, arm, seed in expected:
        if seed not in seeds_of.get((world, arm), ()):
            absent.setdefault((world, arm), []).append(seed)
    rows = []
    for world in sorted({world for world, _ in absent}):
        for arm in in_order(arm for where, arm in absent if where == world):
            rows.append((world, arm, ", ".join(map(str, absent[world, arm])), len(seeds_of.get((world, arm), ()))))
    columns = ("world", "arm", "seeds that are missing", "seeds that are there")
    return [Table("Not there yet", columns, tuple(rows), "The same command continues the study.")] if rows else []


def _equal_kl(results: Results, world: str, level: float, reaches: dict[str, float]) -> Table:
    measures = ["judge", "length", *results.behaviours(world)]
    arms, kept = list(reaches), []
    lists: dict[str, list[Mean]] = {name: [] for name in measures}
    base = results.curves.get((world, BASELINE), {})
    apart = []
    for arm in arms:
        runs = results.curves[world, arm]
        if reaches[arm] < level * (1 - 1e-9):
            continue
        kept.append(arm)
        for name in measures:
            lists[name].append(mean_interval([[_at(rows, name, level)] for rows in runs.values()]))
        shared = sorted(runs.keys() & base.keys()) if arm != BASELINE else []
        sides = [[[_at(side[seed], "judge", level)] for seed in shared] for side in (runs, base)]
        apart.append(difference_interval(*sides) if shared else mean_interval([]))
    texts = {name: _texts(means) for name, means in lists.items()}
    difference = _texts(apart, signed=True)
    rows: list[tuple[Any, ...]] = []
    for arm in arms:
        if arm in kept:
            n = kept.index(arm)
            rows.append(
                (arm, reaches[arm], texts["judge"][n], difference[n], *(texts[name][n] for name in measures[1:]))
            )
        else:
            rows.append((arm, reaches[arm], "not reached", *[None] * len(measures)))
    columns = ("arm", "KL reached", "judge", f"less {BASELINE}", *measures[1:])
    note = (
        f"Interpolated along each final run, on the selection prompts, where its KL first came to {level:.3g} nats a "
    )
    note += "response. KL reached: by every seed. "
    return Table(f"{world}: at an equal KL of {level:.3g}", columns, tuple(rows), note + _note(lists["judge"]))


def _at(rows: Sequence[Any], name: str, level: float) -> float:
    found = at_kl(_along(rows, "kl"), _along(rows, name), level)
    return math.nan if found is None else found


def _along(rows: Sequence[Any], name: str) -> list[float]:
    """A quantity along a training run: a field of its rows, or else a behaviour."""
    return [number(row[name] if name in row else row["behaviour"].get(name)) for row in rows]


def _behaviour_of(key: str) -> Callable[[Answers], np.ndarray]:
    return lambda answers: answers.behaviour.get(key, np.full(len(answers.index), np.nan))


def _mean(results: Results, cell: Cell, values: Callable[[Answers], np.ndarray]) -> Mean:
    seeds = list(results.answers[cell].values())
    return mean_interval([values(answers) for answers in seeds], crossed=are_crossed(seeds))


def _win_cell(found: WinRate | None) -> Shaded | None:
    if found is None or math.isnan(found.rate):
        return None
    text = f"{100 * found.rate:.0f} %"
    if found.low is not None and found.high is not None:
        text += f" [{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return Shaded(text, 4 * found.rate - 2, bool(found.verdict))  # full colour from 25 and 75 % on


def _texts(means: Sequence[Mean], *, signed: bool = False) -> list[str | None]:
    """``0.812 ±0.021``, a column with as many decimals; None where there is no value."""
    largest = max((abs(mean.mean) for mean in means if math.isfinite(mean.mean)), default=0.0)
    decimals = 1 if largest >= 10 else 2 if largest > 1 else 3
    texts: list[str | None] = []
    for found in means:
        if math.isnan(found.mean):
            texts.append(None)
            continue
        text = f"{found.mean:{'+' if signed else ''}.{decimals}f}".replace("-", "−")
        if found.high is not None:
            text += f" ±{found.high - found.mean:.{decimals}f}"
        texts.append(text)
    return texts


def _note(found: Sequence[WinRate | Mean]) -> str:
    """What the intervals are, or why some have none."""
    reasons = list(dict.fromkeys(each.note for each in found if each.note and each.seeds))
    held = [each for each in found if each.low is not None]
    told = ""
    if held:
        seeds = sorted({each.seeds for each in held})
        span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        told = f"95 % intervals over {span} seeds, each comparison by itself. "
    return (told + ("No interval: " + ", ".join(reasons) + "." if reasons else "")).strip()
