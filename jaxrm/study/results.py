"""Read the results of a study that may be unfinished: any file may be missing. `jaxrm.study.collect` lists them."""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrm.errors import UserError
from jaxrm.runtime.metrics import read_rows
from jaxrm.study.config import ARMS

SPLITS = ("test", "test_ood")
DECODINGS = ("sampled", "greedy")
_EXAMPLE_PROMPTS = {"test": 8, "test_ood": 4}  # prompts of each split whose answers the report shows

Examples = dict[tuple[str, str, str], dict[str, Mapping[str, Any]]]
"""Rows of answers by ``(world, split, prompt)`` and arm."""


class AnswerKey(NamedTuple):
    """Names a set of answers: an arm in a world, one split of its prompts, one way of decoding."""

    world: str
    arm: str
    split: str
    decoding: str


@dataclass(frozen=True)
class SeedAnswers:
    """The measured answers of one seed to ``P`` prompts; NaN where a value is missing or does not apply.

    Attributes:
      index: ``[P]`` numbers of the prompts, ascending.
      prompts: ``[P]`` checksums of the prompts.
      judge: ``[P]`` judge scores.
      length: ``[P]`` tokens.
      kl: ``[P]`` KL from the SFT policy, nats a response.
      behavior: ``[P]`` of each behavior by name.
    """

    index: np.ndarray
    prompts: np.ndarray
    judge: np.ndarray
    length: np.ndarray
    kl: np.ndarray
    behavior: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Results:
    """A study's results.

    Attributes:
      answers: by key and seed.
      curves: rows of ``curves.jsonl`` by world and arm and by seed, in the order of their steps.
      selection: rows of ``selection.jsonl``.
      agreement: rows of ``agreement.jsonl``.
      examples: rows with the answers of one seed, by ``(world, split, prompt)`` and arm.
    """

    answers: Mapping[AnswerKey, Mapping[int, SeedAnswers]]
    curves: Mapping[tuple[str, str], Mapping[int, Sequence[Mapping[str, Any]]]]
    selection: Sequence[Mapping[str, Any]]
    agreement: Sequence[Mapping[str, Any]]
    examples: Examples = field(default_factory=dict)

    @property
    def worlds(self) -> list[str]:
        """The worlds that have an answer, a curve, a setting or a reward model."""
        rows = (row["world"] for row in [*self.selection, *self.agreement])
        return sorted({*(key.world for key in self.answers), *(world for world, _ in self.curves), *rows})

    @property
    def arms(self) -> list[str]:
        """The arms that have answers, in their order."""
        return in_order(key.arm for key in self.answers)

    def behaviors(self, world: str) -> list[str]:
        """The names of the behaviors that are measured in a world."""
        names: dict[str, None] = {}  # in the order in which they are met
        for key, seeds in self.answers.items():
            if key.world == world:
                for answers in seeds.values():
                    names.update(dict.fromkeys(answers.behavior))
        for (curve_world, _), runs in self.curves.items():
            if curve_world == world:
                names.update(dict.fromkeys(name for rows in runs.values() for row in rows for name in row["behaviour"]))
        return list(names)

    def pairs(self, key: AnswerKey, opponent: str) -> list[tuple[SeedAnswers, SeedAnswers]]:
        """The answers of an arm and of an opponent to the same prompts, for each seed that has both.

        Raises:
          UserError: two answers with the same index belong to different prompts.
        """
        first, second = self.answers.get(key, {}), self.answers.get(key._replace(arm=opponent), {})
        pairs = []
        for seed in sorted(first.keys() & second.keys()):
            a, b = first[seed], second[seed]
            shared = np.intersect1d(a.index, b.index, assume_unique=True)
            a, b = (_take(answers, np.searchsorted(answers.index, shared)) for answers in (a, b))
            if (a.prompts != b.prompts).any():
                raise UserError(
                    f"{key.world}, seed {seed}: {key.arm} and {opponent} were asked different prompts, so that they "
                    "cannot be compared; the results are of two studies: remove those of one and run it again"
                )
            if len(shared):
                pairs.append((a, b))
        return pairs


def in_order(arms: Iterable[str]) -> list[str]:
    """Arms in the order of `jaxrm.study.config.ARMS`, then others by name."""
    return sorted(set(arms), key=lambda arm: (ARMS.index(arm) if arm in ARMS else len(ARMS), arm))


def are_crossed(seeds: Sequence[SeedAnswers]) -> bool:
    """Whether every seed has the same prompts; otherwise the prompts are nested in the seeds."""
    return all(np.array_equal(answers.prompts, seeds[0].prompts) for answers in seeds)


def read_results(folder: Path) -> Results:
    """Read the results of a study that may be unfinished.

    Raises:
      UserError: a row that cannot be read, by file and line.
    """
    results = folder / "results"
    answers, examples = _read_all_answers(results)
    fields = ("world", "arm", "seed", "step", "kl", "judge", "reward", "length", "behaviour")
    curves: dict[tuple[str, str], dict[int, dict[int, Mapping[str, Any]]]] = {}
    for row in _read(results / "curves.jsonl", fields):
        curves.setdefault((row["world"], row["arm"]), {}).setdefault(row["seed"], {})[row["step"]] = row
    return Results(
        answers=answers,
        curves={
            name: {seed: [rows[step] for step in sorted(rows)] for seed, rows in sorted(runs.items())}
            for name, runs in curves.items()
        },
        selection=_read(results / "selection.jsonl", ("world", "arm", "settings", "score", "kl", "chosen", "at_edge")),
        agreement=_read(results / "agreement.jsonl", ("world", "rm", "seed", "kind", "sum", "mean")),
        examples=examples,
    )


def as_float(value: Any) -> float:
    """A number of a row as a float; None is NaN."""
    return float("nan") if value is None else float(value)


def _read_all_answers(results: Path) -> tuple[dict[AnswerKey, dict[int, SeedAnswers]], Examples]:
    """All answers by key and seed, and those of the first seed of each world that the report shows."""
    answers: dict[AnswerKey, dict[int, SeedAnswers]] = {}
    examples: Examples = {}
    files = [
        (file.parent.parent.name, file.parent.name, int(match[1]), file)
        for file in sorted(results.glob("*/*/seed*.jsonl"))
        if (match := re.fullmatch(r"seed(\d+)\.jsonl", file.name))
    ]
    first_seed: dict[str, int] = {}
    for world, _, seed, _ in files:
        first_seed[world] = min(seed, first_seed.get(world, seed))
    for world, arm, seed, file in files:
        rows = read_rows(file)
        for (split, decoding), seed_answers in _parse_answers(rows, file).items():
            answers.setdefault(AnswerKey(world, arm, split, decoding), {})[seed] = seed_answers
        if seed == first_seed[world]:
            for row in rows:
                if row["decoding"] == "sampled" and row["index"] < _EXAMPLE_PROMPTS.get(row["split"], 0):
                    examples.setdefault((world, row["split"], row["prompt"]), {})[arm] = row
    return answers, examples


def _read(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    rows = read_rows(path)
    for line, row in enumerate(rows, 1):
        missing = [name for name in fields if name not in row]
        if missing:
            raise UserError(f"{path}:{line} has no {missing[0]!r}; a row has {', '.join(fields)}; remove the line")
    return rows


def _parse_answers(rows: Sequence[Mapping[str, Any]], file: Path) -> dict[tuple[str, str], SeedAnswers]:
    """The answers by split and decoding; of two with one index the later one counts."""
    by_index: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for line, row in enumerate(rows, 1):
        try:
            float(row["judge"]), float(row["length"]), row["prompt"].encode(), row["behaviour"].items(), row["response"]
            by_index.setdefault((row["split"], row["decoding"]), {})[int(row["index"])] = row
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{file}:{line} is no answer: {type(error).__name__} {error}; required split, decoding, index, prompt, "
                "response, judge, length and behaviour; remove the file, and the study writes it again"
            ) from None
    return {name: _to_arrays([indexed[index] for index in sorted(indexed)]) for name, indexed in by_index.items()}


def _to_arrays(rows: Sequence[Mapping[str, Any]]) -> SeedAnswers:
    behaviors = list(dict.fromkeys(name for row in rows for name in row["behaviour"]))
    return SeedAnswers(
        index=np.array([int(row["index"]) for row in rows]),
        prompts=np.array([zlib.crc32(row["prompt"].encode()) for row in rows]),
        judge=np.array([float(row["judge"]) for row in rows]),
        length=np.array([float(row["length"]) for row in rows]),
        kl=np.array([as_float(row.get("kl")) for row in rows]),
        behavior={name: np.array([as_float(row["behaviour"].get(name)) for row in rows]) for name in behaviors},
    )


def _take(answers: SeedAnswers, positions: np.ndarray) -> SeedAnswers:
    return SeedAnswers(
        answers.index[positions],
        answers.prompts[positions],
        answers.judge[positions],
        answers.length[positions],
        answers.kl[positions],
        {name: values[positions] for name, values in answers.behavior.items()},
    )
