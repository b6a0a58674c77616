"""Preference benchmarks for `jaxrm.score`: read, scored by every kind, and shown by subset.

A row has a prompt, a ``chosen`` and a ``rejected`` response, each a text or a list of texts, and perhaps a ``subset``:
the forms of RewardBench (arXiv 2403.13787), of RewardBench 2 (arXiv 2506.01937, one good answer of four), and of any
file of pairs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm import atomic
from jaxrm.data.config import DataConfig
from jaxrm.data.fields import BadRecordError
from jaxrm.data.prompt_columns import read_prompt
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import Message, PreferenceRecord
from jaxrm.data.schemas import parse
from jaxrm.data.sides import find_side
from jaxrm.errors import UserError
from jaxrm.evaluation.benchmark import BenchmarkRow, ScoredChoice, benchmark_rows
from jaxrm.inference.classifier import Classifier
from jaxrm.inference.reward_model import RewardModel
from jaxrm.ops.reward_kinds import KINDS, find_kind
from jaxrm.runtime.progress import print_table

_NO_SUBSET = ""


@dataclass(frozen=True)
class Choice:
    """A prompt with good and bad responses.

    Attributes:
      source: where it was read.
      prompt: messages.
      chosen: good responses.
      rejected: bad responses.
      subset: of the benchmark; empty where the file has none.
    """

    source: str
    prompt: Sequence[Message]
    chosen: Sequence[str]
    rejected: Sequence[str]
    subset: str


def read_choices(path: str, max_records: int | None) -> tuple[list[Choice], ReadReport]:
    """The records of a benchmark; rows that are none are reported.

    Raises:
      UserError: there is no such file, or no record in it.
    """
    side = find_side(DataConfig(path=path, eval_path=path), held_out=True)
    choices, report = [], ReadReport()
    for source, row in side.rows():
        report.total += 1
        try:
            if isinstance(row, BadRecordError):
                raise row
            choices.append(_choice(source, row))
        except BadRecordError as error:
            report.add_bad(str(error), source)
        if len(choices) == max_records:
            break
    report.used = len(choices)
    if not choices:
        reason, count = next(iter(report.bad.items()), ("it has no rows", None))
        where = "" if count is None else f" (first at {count.first})"
        raise UserError(
            f"--pairs is {path!r}, which has no record: {reason}{where}; required are rows with prompt, chosen and "
            "rejected, and perhaps subset"
        )
    return choices, report


def _choice(source: str, row: Any) -> Choice:
    if not isinstance(row, Mapping):
        raise BadRecordError("it is no object")
    subset = row.get("subset", _NO_SUBSET)
    if not isinstance(subset, str):
        raise BadRecordError("'subset' is no text")
    if _is_texts(row.get("chosen")) or _is_texts(row.get("rejected")):
        chosen, rejected = (_texts(row.get(name), name) for name in ("chosen", "rejected"))
        return Choice(source, read_prompt(dict(row)), chosen, rejected, subset)
    record = parse("preference", dict(row), source, DataConfig.preferred)
    assert isinstance(record, PreferenceRecord), record
    return Choice(source, record.prompt, [record.chosen], [record.rejected], subset)


def _texts(value: Any, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not _is_texts(texts) or not all(text.strip() for text in texts):
        raise BadRecordError(f"{name!r} must be a text or a list of texts, none of them empty")
    return list(texts)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def kinds_to_score(model: RewardModel | Classifier, kind: str | None) -> list[str]:
    """The kind asked for; with ``all``, each that the model gives without a reference or a correction."""
    if kind != "all":
        return [kind or model.kind]
    kinds = []
    for name in KINDS:
        if find_kind(name).needs_reference or find_kind(name).needs_correction:
            continue
        try:
            model.check_kind(name, "kind")
        except UserError:
            continue
        kinds.append(name)
    return kinds


def score_choices(
    model: RewardModel | Classifier, choices: Sequence[Choice], kinds: Sequence[str], batch_size: int
) -> dict[str, list[BenchmarkRow]]:
    """The rows of a benchmark by each kind; all of them are given by one reading."""
    texts = [[*choice.chosen, *choice.rejected] for choice in choices]
    prompts = [choice.prompt for choice, own in zip(choices, texts, strict=True) for _ in own]
    sums = model.sums(prompts, [text for own in texts for text in own], kinds, batch_size=batch_size)
    return {kind: benchmark_rows(_scored(choices, rewards)) for kind, rewards in sums.items()}


def _scored(choices: Sequence[Choice], rewards: np.ndarray) -> list[ScoredChoice]:
    in_order = iter(map(float, rewards))
    scored = []
    for choice in choices:
        good, bad = ([next(in_order) for _ in side] for side in (choice.chosen, choice.rejected))
        lengths = [[len(text.split()) for text in side] for side in (choice.chosen, choice.rejected)]
        scored.append(ScoredChoice(choice.subset, good, bad, lengths[0], lengths[1]))
    return scored


def run_benchmark(
    models: Sequence[RewardModel | Classifier],
    path: str,
    *,
    kind: str | None,
    batch_size: int,
    max_records: int | None,
    output: str | None,
) -> None:
    """Score a benchmark with each model, print a table of accuracies and one of the rest, and write both as JSON.

    Args:
      models: one or several.
      path: of the benchmark.
      kind: of token reward, ``all``, or None for each model's own.
      batch_size: responses scored at once.
      max_records: read no more than so many.
      output: JSON to write; None for none.

    Raises:
      UserError: as `read_choices`; or a response cannot be scored.
    """
    choices, report = read_choices(path, max_records)
    print_table(f"Records in {path}", ["records", "number", "first at"], report.rows())
    results: dict[str, list[BenchmarkRow]] = {}
    for model in models:
        by_kind = score_choices(model, choices, kinds_to_score(model, kind), batch_size)
        results |= {f"{model.name}, {each}": rows for each, rows in by_kind.items()}
    names = [row.subset or "no subset" for row in next(iter(results.values()))]
    accuracies = [[_accuracy(rows[i]) for rows in results.values()] for i in range(len(names))]
    counts = [row.records for row in next(iter(results.values()))]
    print_table(
        "Accuracy, %",
        ["subset", "records", *results],
        [[name, count, *cells] for name, count, cells in zip(names, counts, accuracies, strict=True)],
    )
    print_table(
        "Over all records",
        ["", "ties", "calibration error", "r with length", "accuracy at equal length", "records of equal length"],
        [_summary(name, rows) for name, rows in results.items()],
    )
    if output is not None:
        content = {name: [dataclasses.asdict(row) for row in rows] for name, rows in results.items()}
        atomic.write_json(Path(output).expanduser(), content)
        print(f"The figures are in {output}")


def _accuracy(row: BenchmarkRow) -> str:
    bounds = "" if row.low is None or row.high is None else f" [{100 * row.low:.1f}, {100 * row.high:.1f}]"
    return f"{100 * row.accuracy:.1f}{bounds}"


def _summary(name: str, rows: Sequence[BenchmarkRow]) -> list[Any]:
    every = next(row for row in rows if row.subset == "all")
    figures = (every.ties, every.calibration_error, every.length_correlation, every.matched, every.num_matched)
    return [name, *figures]
