"""The tables of a comparison on the console, and its page."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm.data.prompts import transcript
from jaxrm.evaluation.refusals import measured_errors
from jaxrm.inference import weights
from jaxrm.models.build import ModelSource
from jaxrm.reports.report import (
    Cell,
    ExampleResponse,
    Interval,
    Intervals,
    Report,
    ReportExample,
    Shaded,
    Table,
    write_report,
)
from jaxrm.runtime.progress import print_table
from jaxrm.stage_config import Compare
from jaxrm.stages.compare.answers import AnswerKey
from jaxrm.stages.compare.histograms import length_histograms
from jaxrm.stages.compare.measures import Comparison, Row, lengths_of
from jaxrm.stages.compare.prompts import PromptSet
from jaxrm.stages.compare.token_rewards import TokenRewardRows

_MOST_BIAS = 0.5  # for a place, of a judge whose rates are to be read
_LONGEST = 0.1  # share of the prompts that "longest answers" shows

_WINS_NOTE = (
    "A tie counts half. Intervals are 95 %, over prompts; with three seeds or more they reach at least as far as those "
    "over seeds."
)
_VERDICTS_NOTE = (
    "Length-controlled: the win rate that a logistic regression predicts for answers of equal length. Place: how far "
    "the judge prefers the first place, from −1 to 1."
)
_QUARTERS = "Win rates by difference of length"
_QUARTERS_NOTE = "In % of a quarter's prompts; in brackets how many words more than the other policy's answers have."
_ANSWERS_NOTE = (
    "Distinct-2: different pairs of words over all. Repeat: words of the longest span that an answer has twice. "
    "KL: nats a sampled answer, to the reference, at the sampling temperature. Perplexity: of the answers under the "
    "reference, at temperature 1."
)


def result_tables(config: Compare, comparison: Comparison) -> list[Table]:
    """The tables, the most important first."""
    tables = []
    if comparison.tables["wins"]:
        tables.append(who_wins(comparison.tables["wins"]))
    tables.append(_table("Answers", _ANSWER_COLUMNS, comparison.tables["answers"], _ANSWERS_NOTE))
    if comparison.tables["labels"]:
        tables.append(
            _table("Refusals by what was asked", _LABEL_COLUMNS, comparison.tables["labels"], refusal_note(config))
        )
    if comparison.tables["wins"]:
        verdicts = _table("Verdicts", _VERDICT_COLUMNS, comparison.tables["wins"], _VERDICTS_NOTE)
        tables.append(dataclasses.replace(verdicts, is_folded=True))
        tables.append(_quarters(comparison.tables["quartiles"]))
    if comparison.tables["agreement"]:
        tables.append(_table("Agreement of judges", _AGREEMENT_COLUMNS, comparison.tables["agreement"]))
    return tables


def who_wins(wins: Sequence[Row]) -> Table:
    """Win rates, a column for each judge, from the rows of the table ``wins``."""
    judges = list(dict.fromkeys(row["judge"] for row in wins))
    by_place: dict[tuple[str, ...], dict[str, Cell]] = {}
    for row in wins:
        place = (f"{row['policy']} against {row['against']}", row["prompts"], row["decoding"])
        by_place.setdefault(place, {})[row["judge"]] = _shaded(row, "win_rate")
    columns = ("policy", "prompts", "decoding", *(f"{judge}, %" for judge in judges))
    rows = tuple((*place, *(cells.get(judge) for judge in judges)) for place, cells in by_place.items())
    places: dict[str, list[float]] = {}
    for row in wins:
        if row["position_bias"] is not None:
            places.setdefault(row["judge"], []).append(row["position_bias"])
    biases = {judge: sum(each) / len(each) for judge, each in places.items()}
    warnings = [
        f" {judge} goes by the {'first' if bias > 0 else 'second'} place more than by the answer ({bias:+.2f} of −1 to "
        "1), so its rates say little."
        for judge, bias in biases.items()
        if abs(bias) > _MOST_BIAS
    ]
    return Table("Who wins, by judge", columns, rows, _WINS_NOTE + "".join(warnings))


def _quarters(quartiles: Sequence[Row]) -> Table:
    """Win rates by difference of length, a column for each quarter."""
    by_place: dict[tuple[str, ...], dict[int, Cell]] = {}
    for row in quartiles:
        place = (f"{row['policy']} against {row['against']}", row["prompts"], row["decoding"], row["judge"])
        words = f"{100 * row['win_rate']:.0f} ({_signed(row['least'])} to {_signed(row['most'])})"
        by_place.setdefault(place, {})[row["quarter"]] = Shaded(words, 2 * row["win_rate"] - 1)
    names = ("shortest quarter", "second", "third", "longest quarter")
    rows = tuple((*place, *(cells.get(n) for n in (1, 2, 3, 4))) for place, cells in by_place.items())
    return Table(_QUARTERS, ("policy", "prompts", "decoding", "judge", *names), rows, _QUARTERS_NOTE, is_folded=True)


def refusal_note(config: Compare) -> str:
    """How refusals were told, and how well."""
    if config.compare.refusal_judge is not None:
        return f"Refusals are what the judge {config.compare.refusal_judge} says."
    precision, recall, count = measured_errors()
    return (
        f"Refusals are told by rules: on {count:,} other English answers labeled by hand, precision {precision:.2f} "
        f"and recall {recall:.2f}. All answers to harmful prompts that do not refuse count, also those off the point."
    )


def print_tables(config: Compare, comparison: Comparison) -> None:
    """Print them all but the quartiles."""
    for table in result_tables(config, comparison):
        if table.title != _QUARTERS:
            print_table(table.title, table.columns, [[_plain(cell) for cell in row] for row in table.rows])


def write(config: Compare, comparison: Comparison, path: Path, token_rewards: TokenRewardRows) -> None:
    """Write the page."""
    names = list(config.policies)
    page = Report(
        title=f"{', '.join(names[:-1])} and {names[-1]} compared",
        about=_about(config, comparison),
        tables=result_tables(config, comparison),
        intervals=_intervals(comparison),
        curves=length_histograms(comparison.answers),
        curves_heading="Lengths",
        examples=_examples(config, comparison, token_rewards),
    )
    write_report(path, page)


def _about(config: Compare, comparison: Comparison) -> list[tuple[str, str]]:
    about = []
    for name, policy in config.policies.items():
        source = ModelSource(path=policy.path, adapter=policy.adapter)
        about.append((name, f"answers in {policy.answers}" if policy.path is None else weights.name_of(source)))
    about += [
        (f"prompts {name}", f"{len(each.prompts):,} of {config.prompts[name].path}{_left_out(each)}")
        for name, each in comparison.sets.items()
    ]
    return about


def _left_out(prompts: PromptSet) -> str:
    num_bad = sum(count.count for count in prompts.report.bad.values())
    return f", without {num_bad:,} records that are no prompts" if num_bad else ""


def _intervals(comparison: Comparison) -> list[Intervals]:
    charts = []
    wins = [row for row in comparison.tables["wins"] if row["win_rate"] is not None]
    if wins:
        rows = tuple(
            Interval(
                f"{row['policy']} against {row['against']}, {row['prompts']}, {row['decoding']}",
                row["judge"],
                row["win_rate"],
                row["win_rate_low"],
                row["win_rate_high"],
            )
            for row in wins
        )
        charts.append(Intervals("Win rates", "%, a tie counts half", rows, 0.5))
    rows = tuple(
        Interval(
            f"{row['prompts']}, {row['decoding']}",
            row["policy"],
            row["refusals"],
            row["refusals_low"],
            row["refusals_high"],
        )
        for row in sorted(comparison.tables["answers"], key=lambda row: (row["prompts"], row["decoding"]))
        if row["refusals"] is not None
    )
    charts.append(Intervals("Refusals", "% of the answers", rows))
    return charts


def _examples(config: Compare, comparison: Comparison, token_rewards: TokenRewardRows) -> list[ReportExample]:
    """Answers of the first runs side by side, with verdicts, and what a reader may choose them by."""
    examples = []
    for prompts, decoding in dict.fromkeys((key.prompts, key.decoding) for key in comparison.answers):
        keys = [key for key in comparison.answers if (key.prompts, key.decoding, key.run) == (prompts, decoding, 0)]
        longest = np.max([lengths_of(comparison.answers[key]) for key in keys], axis=0)
        bound = np.quantile(longest, 1 - _LONGEST)
        for index, prompt in enumerate(comparison.sets[prompts].prompts):
            responses = tuple(_response(comparison, key, index, token_rewards) for key in keys)
            verdicts = _verdicts_at(comparison, prompts, decoding, index)
            tags = [f"set {prompts}", decoding]
            if any(len(set(each)) > 1 for each in verdicts.values()):
                tags.append("judges disagree")
            if any(comparison.refused[key][index] == 1 for key in keys):
                tags.append("refused")
            if longest[index] >= bound:
                tags.append("longest")
            examples.append(ReportExample(transcript(prompt), responses, tuple(tags)))
    return examples


def _verdicts_at(comparison: Comparison, prompts: str, decoding: str, index: int) -> dict[tuple[str, str], list[float]]:
    verdicts: dict[tuple[str, str], list[float]] = {}
    for duel in comparison.duels:
        if (duel.prompts, duel.decoding) == (prompts, decoding) and not np.isnan(duel.outcomes[0, index]):
            verdicts.setdefault((duel.policy, duel.other), []).append(float(duel.outcomes[0, index]))
    return verdicts


def _response(comparison: Comparison, key: AnswerKey, index: int, token_rewards: TokenRewardRows) -> ExampleResponse:
    row, words = comparison.answers[key][index], {1.0: "wins", 0.5: "ties", 0.0: "loses"}
    facts = [("words", f"{len(row['response'].split())}")]
    if comparison.refused[key][index] == 1:
        facts.append(("refuses", "yes"))
    for duel in comparison.duels:
        if (duel.policy, duel.prompts, duel.decoding) == (key.policy, key.prompts, key.decoding):
            verdict = words.get(float(duel.outcomes[0, index]), "no verdict")
            facts.append((duel.judge, f"{verdict} against {duel.other}"))
    scored = token_rewards.get((key, index))
    tokens, rewards = ((), ()) if scored is None else (tuple(scored["tokens"]), tuple(scored["rewards"]))
    return ExampleResponse(key.policy, row["response"], tokens, rewards, tuple(facts))


def _table(title: str, columns: dict[str, Callable[[Row], Cell]], rows: Sequence[Row], note: str = "") -> Table:
    """A table without the columns in which no row has anything."""
    cells = {name: [make(row) for row in rows] for name, make in columns.items()}
    filled = {name: column for name, column in cells.items() if any(cell not in (None, "–") for cell in column)}
    return Table(title, tuple(filled), tuple(zip(*filled.values(), strict=True)), note)


def _signed(words: float) -> str:
    return f"{words:+.0f}".replace("-", "−").replace("+0", "0")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def _interval(row: Row, name: str) -> str:
    value, low, high = row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high")
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def _shaded(row: Row, name: str) -> Cell:
    """A win rate on the color of its distance from one half; bold where the interval leaves one half out."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if value is None:
        return "–"
    decided = low is not None and (low > 0.5 or high < 0.5)
    return Shaded(_interval(row, name), 2 * value - 1, decided)


def _plain(cell: Cell) -> Any:
    return str(cell) if isinstance(cell, Shaded) else cell


_ANSWER_COLUMNS: dict[str, Callable[[Row], Cell]] = {
    "policy": lambda row: row["policy"],
    "prompts": lambda row: row["prompts"],
    "decoding": lambda row: row["decoding"],
    "refusals, %": lambda row: _interval(row, "refusals"),
    "words": lambda row: row["words"],
    "distinct-2": lambda row: row["distinct_2"],
    "repeat": lambda row: row["longest_repeat"],
    "ended": lambda row: row["ended"],
    "KL": lambda row: row["kl"],
    "perplexity": lambda row: row["perplexity"],
}
_LABEL_COLUMNS: dict[str, Callable[[Row], Cell]] = {
    "policy": lambda row: row["policy"],
    "decoding": lambda row: row["decoding"],
    "harmless prompts refused, %": lambda row: _interval(row, "refused_of_harmless"),
    "harmful prompts answered, %": lambda row: _interval(row, "complied_of_harmful"),
}
_VERDICT_COLUMNS: dict[str, Callable[[Row], Cell]] = {
    "policy": lambda row: f"{row['policy']} against {row['against']}",
    "prompts": lambda row: row["prompts"],
    "decoding": lambda row: row["decoding"],
    "judge": lambda row: row["judge"],
    "win / tie / loss, %": lambda row: " / ".join(_percent(row[side]) for side in ("wins", "ties", "losses")),
    "length-controlled, %": lambda row: _interval(row, "length_controlled"),
    "place": lambda row: row["position_bias"],
    "verdicts": lambda row: row["verdicts"],
}
_AGREEMENT_COLUMNS: dict[str, Callable[[Row], Cell]] = {
    "judges": lambda row: f"{row['judge']} and {row['other']}",
    "equal verdicts": lambda row: row["equal"],
    "kappa": lambda row: row["kappa"],
    "pairs": lambda row: row["pairs"],
}
