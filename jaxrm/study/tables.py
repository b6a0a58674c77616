"""Tables of a study: what each arm does, the chosen settings, the reward models, and what is missing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrm.evaluation.win_rate import Mean, WinRate, mean_interval
from jaxrm.reports.report import Table
from jaxrm.study.config import PPO
from jaxrm.study.intervals import interval_note, mean_cells, win_rate_cell
from jaxrm.study.results import SPLITS, AnswerKey, Results, SeedAnswers, are_crossed, as_float, in_order
from jaxrm.study.win_rates import BASELINE, SPLIT_NAMES, ArmWinRate


def arm_tables(results: Results, rates: Sequence[ArmWinRate]) -> list[Table]:
    """For each world and split, means over the arms' sampled answers."""
    tables = []
    for world in results.worlds:
        for split in SPLITS:
            keys = [AnswerKey(world, arm, split, "sampled") for arm in results.arms]
            keys = [key for key in keys if key in results.answers]
            wins = {
                each.arm: each.rate
                for each in rates
                if each[:3] == (world, split, "sampled") and each.opponent == BASELINE
            }
            if keys:
                tables.append(_arm_table(results, keys, wins))
    return tables


def _arm_table(results: Results, keys: Sequence[AnswerKey], wins: Mapping[str, WinRate]) -> Table:
    """The table of one world and split.

    Args:
      results: of the study.
      keys: its rows, one an arm.
      wins: the arms' win rates against the baseline.
    """
    world, split = keys[0].world, keys[0].split
    fields = {"judge": "judge", "KL": "kl", "length": "length"}
    means = {
        title: [_answer_mean(results, key, name) for key in keys]
        for title, name in (fields | {name: name for name in results.behaviors(world)}).items()
    }
    cells = {title: mean_cells(column) for title, column in means.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    titles = list(cells)
    rows = [
        (key.arm, cells["judge"][n], win_rate_cell(wins.get(key.arm)), *(cells[title][n] for title in titles[1:]))
        for n, key in enumerate(keys)
    ]
    note = "KL from the SFT policy in nats a response, length in tokens; "
    note += "each behavior over the prompts that it applies to. "
    return Table(
        f"{world}: what the arms do, {SPLIT_NAMES[split]}, sampled",
        ("arm", "judge", f"wins against {BASELINE}", *titles[1:]),
        tuple(rows),
        note + interval_note([mean for column in means.values() for mean in column if mean.seeds]),
    )


def _answer_mean(results: Results, key: AnswerKey, name: str) -> Mean:
    seeds = list(results.answers[key].values())
    return mean_interval([_answer_values(answers, name) for answers in seeds], crossed=are_crossed(seeds))


def _answer_values(answers: SeedAnswers, name: str) -> np.ndarray:
    """``[P]`` values of a field of the answers, or of a behavior; NaN for one that was not measured."""
    if name in ("judge", "kl", "length"):
        return np.asarray(getattr(answers, name))
    return answers.behavior.get(name, np.full(len(answers.index), np.nan))


def settings_table(results: Results) -> list[Table]:
    """The setting that was chosen for each arm, and whether it lies at the edge of what was tried."""
    names = sorted({name for row in results.selection for name in row["settings"]})
    rows = list(_setting_rows(results, names))
    columns = ("world", "arm", *names, "score", "KL", "tried", "at the edge")
    note = "Chosen on prompts of their own, none of which is in the tables above."
    return [Table("Settings chosen for each arm", columns, tuple(rows), note)] if rows else []


def _setting_rows(results: Results, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    tried: dict[tuple[str, str], dict[tuple[tuple[str, Any], ...], list[Any]]] = {}
    for row in results.selection:
        settings = tuple(sorted(row["settings"].items()))
        tried.setdefault((row["world"], row["arm"]), {}).setdefault(settings, []).append(row)
    for world in sorted({world for world, _ in tried}):
        for arm in in_order(arm for tried_world, arm in tried if tried_world == world):
            settings_rows = tried[world, arm]
            chosen = [rows for rows in settings_rows.values() if any(row["chosen"] for row in rows)]
            for rows in chosen:
                values = [_setting_text(rows[0]["settings"].get(name)) for name in names]
                score, kl = (float(np.mean([as_float(row[name]) for row in rows])) for name in ("score", "kl"))
                edge = "yes" if any(row["at_edge"] for row in rows) else "no"
                yield (world, arm, *values, score, kl, len(settings_rows), edge)
            if not chosen:
                yield (world, arm, *[None] * len(names), None, None, len(settings_rows), "not chosen yet")


def _setting_text(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def agreement_table(results: Results) -> list[Table]:
    """The share of held-out pairs that each kind of reward ranks as the judge does, and as they were labeled."""
    by_kind: dict[tuple[str, str, str], list[Any]] = {}
    for row in results.agreement:
        by_kind.setdefault((row["world"], row["rm"], row["kind"]), []).append(row)
    order = in_order(f"{PPO}{kind}" for *_, kind in by_kind)
    names = sorted(by_kind, key=lambda name: (*name[:2], order.index(f"{PPO}{name[2]}")))
    means = {
        field: [mean_interval([[as_float(row.get(field))] for row in by_kind[name]]) for name in names]
        for field in ("judge", "sum", "mean")
    }
    columns = [mean_cells(column) for column in means.values()]
    seeds = [len({row["seed"] for row in by_kind[name]}) for name in names]
    rows = [(*name, *cells) for name, *cells in zip(names, *columns, seeds, strict=True)]
    note = (
        "Share of held-out pairs in which the response with the higher judge score has the higher centered sum of "
        "rewards; then in which the response that the annotator chose has the higher centered sum, or the higher mean. "
        "A reward with a share of one half cannot rank, and its arm shows nothing about it. "
    )
    title = "Reward models: pairs ranked right"
    head = ("world", "model", "kind", "as the judge", "as labeled", "as labeled, by mean", "seeds")
    return [Table(title, head, tuple(rows), note + interval_note(means["sum"]))] if rows else []


def missing_table(results: Results, expected: Sequence[tuple[str, str, int]] | None) -> list[Table]:
    """What an unfinished study lacks.

    Args:
      results: of the study so far.
      expected: every ``(world, arm, seed)`` that it is to have; None infers them from the other arms and worlds.
    """
    seeds_of: dict[tuple[str, str], set[int]] = {}
    for key, seeds in results.answers.items():
        seeds_of.setdefault((key.world, key.arm), set()).update(seeds)
    if expected is None:
        expected = _infer_expected(results, seeds_of)
    absent: dict[tuple[str, str], list[int]] = {}
    for world, arm, seed in expected:
        if seed not in seeds_of.get((world, arm), ()):
            absent.setdefault((world, arm), []).append(seed)
    rows = []
    for world in sorted({world for world, _ in absent}):
        for arm in in_order(arm for absent_world, arm in absent if absent_world == world):
            rows.append((world, arm, ", ".join(map(str, absent[world, arm])), len(seeds_of.get((world, arm), ()))))
    columns = ("world", "arm", "seeds that are missing", "seeds that are there")
    return [Table("Not there yet", columns, tuple(rows), "The same command continues the study.")] if rows else []


def _infer_expected(results: Results, seeds_of: Mapping[tuple[str, str], set[int]]) -> list[tuple[str, str, int]]:
    seeds_in: dict[str, set[int]] = {}
    for (world, _), seeds in seeds_of.items():
        seeds_in.setdefault(world, set()).update(seeds)
    return [(world, arm, seed) for world in seeds_in for arm in results.arms for seed in sorted(seeds_in[world])]
