"""What a study has found so far, read from its folder.

    STUDY/results/
      <world>/<arm>/seed<k>.jsonl   one row per answer to a test prompt
      curves.jsonl                  what was measured along the training of the final runs
      selection.jsonl               each setting that was tried, with its score
      agreement.jsonl               how each reward model ranks held-out pairs

Every file may be missing or grow yet.
"""

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
_SHOWN = {"test": 8, "test_ood": 4}  # prompts of each split whose answers are kept whole, as examples


class Cell(NamedTuple):
    """Which answers: those of an arm in a world, to one split of its prompts, decoded in one way."""

    world: str
    arm: str
    split: str
    decoding: str


@dataclass(frozen=True)
class Answers:
    """The answers of one seed, ``[P]`` each, by ascending index; NaN where something is missing or does not apply."""

    index: np.ndarray
    prompts: np.ndarray  # checksums of the prompts
    judge: np.ndarray
    length: np.ndarray
    kl: np.ndarray
    behaviour: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Results:
    """A study's results.

    Attributes:
      answers: by cell and seed.
      curves: rows of ``curves.jsonl`` by world and arm and by seed, in the order of their steps.
      selection: rows of ``selection.jsonl``.
      agreement: rows of ``agreement.jsonl``.
      examples: rows with answers of one seed, by ``(world, split, prompt)`` and arm.
    """

    answers: Mapping[Cell, Mapping[int, Answers]]
    curves: Mapping[tuple[str, str], Mapping[int, Sequence[Mapping[str, Any]]]]
    selection: Sequence[Mapping[str, Any]]
    agreement: Sequence[Mapping[str, Any]]
    examples: Mapping[tuple[str, str, str], Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def worlds(self) -> list[str]:
        """The worlds that have an answer, a curve, a setting or a reward model."""
        rows = (row["world"] for row in [*self.selection, *self.agreement])
        return sorted(
            dict.fromkeys([*(cell.world for cell in self.answers), *(world for world, _ in self.curves), *rows])
        )

    @property
    def arms(self) -> list[str]:
        """The arms that have answers, in their order."""
        return in_order(cell.arm for cell in self.answers)

    def behaviours(self, world: str) -> list[str]:
        """What is watched in a world."""
        found: dict[str, None] = {}
        for cell, seeds in self.answers.items():
            if cell.world == world:
                for answers in seeds.values():
                    found.update(dict.fromkeys(answers.behaviour))
        for (where, _), runs in self.curves.items():
            if where == world:
                found.update(dict.fromkeys(key for rows in runs.values() for row in rows for key in row["behaviour"]))
        return list(found)

    def pairs(self, cell: Cell, opponent: str) -> list[tuple[Answers, Answers]]:
        """The answers of an arm and of another one to the same prompts, for each seed that has both."""
        first, second = self.answers.get(cell, {}), self.answers.get(cell._replace(arm=opponent), {})
        found = []
        for seed in sorted(first.keys() & second.keys()):
            a, b = first[seed], second[seed]
            shared = np.intersect1d(a.index, b.index, assume_unique=True)
            a, b = (_take(side, np.searchsorted(side.index, shared)) for side in (a, b))
            if (a.prompts != b.prompts).any():
                raise UserError(
                    f"{cell.world}, seed {seed}: {cell.arm} and {opponent} were asked different prompts, so that they "
                    "cannot be compared; the results are of two studies: remove those of one and run it again"
                )
            if len(shared):
                found.append((a, b))
        return found


def in_order(arms: Iterable[str]) -> list[str]:
    """Arms in the order of `jaxrm.study.config.ARMS`, then others by name."""
    return sorted(dict.fromkeys(arms), key=lambda arm: (_place(arm), arm))


def are_crossed(answers: Sequence[Answers]) -> bool:
    """Whether every seed was asked the same prompts; else the prompts are nested in the seeds."""
    return all(np.array_equal(each.prompts, answers[0].prompts) for each in answers)


def read_results(folder: Path) -> Results:
    """Read the results of a study that may be unfinished.

    Raises:
      UserError: a row that cannot be read, by file and line.
    """
    results = folder / "results"
    answers: dict[Cell, dict[int, Answers]] = {}
    examples: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    files = [(*found, file) for file in sorted(results.glob("*/*/seed*.jsonl")) if (found := _names(file))]
    first_seed: dict[str, int] = {}
    for world, _, seed, _ in files:
        first_seed[world] = min(seed, first_seed.get(world, seed))
    for world, arm, seed, file in files:
        rows = read_rows(file)
        for (split, decoding), held in _read_answers(rows, file).items():
            answers.setdefault(Cell(world, arm, split, decoding), {})[seed] = held
        if seed == first_seed[world]:
            for row in rows:
                if row["decoding"] == "sampled" and row["index"] < _SHOWN.get(row["split"], 0):
                    examples.setdefault((world, row["split"], row["prompt"]), {})[arm] = row
    curves: dict[tuple[str, str], dict[int, dict[int, Mapping[str, Any]]]] = {}
    needed = ("world", "arm", "seed", "step", "kl", "judge", "reward", "length", "behaviour")
    for row in _read(results / "curves.jsonl", needed):
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


def number(value: Any) -> float:
    """A number of a row as a float; None is NaN."""
    return float("nan") if value is None else float(value)


def _names(file: Path) -> tuple[str, str, int] | None:
    found = re.fullmatch(r"seed(\d+)\.jsonl", file.name)
    return (file.parent.parent.name, file.parent.name, int(found[1])) if found else None


def _place(arm: str) -> int:
    return ARMS.index(arm) if arm in ARMS else len(ARMS)


def _read(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    rows = read_rows(path)
    for line, row in enumerate(rows, 1):
        missing = [name for name in needed if name not in row]
        if missing:
            raise UserError(f"{path}:{line} has no {missing[0]!r}; a row has {', '.join(needed)}; remove the line")
    return rows


def _read_answers(rows: Sequence[Mapping[str, Any]], file: Path) -> dict[tuple[str, str], Answers]:
    """The answers by split and decoding; of two with one index the latest counts."""
    kept: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for line, row in enumerate(rows, 1):
        try:
            float(row["judge"]), float(row["length"]), row["prompt"].encode(), row["behaviour"].items(), row["response"]
            kept.setdefault((row["split"], row["decoding"]), {})[int(row["index"])] = row
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{file}:{line} is no answer: {type(error).__name__} {error}; required split, decoding, index, prompt, "
                "response, judge, length and behaviour; remove the file, and the study writes it again"
            ) from None
    return {name: _answers([by_index[index] for index in sorted(by_index)]) for name, by_index in kept.items()}


def _answers(rows: Sequence[Mapping[str, Any]]) -> Answers:
    keys = list(dict.fromkeys(key for row in rows for key in row["behaviour"]))
    return Answers(
        index=np.array([int(row["index"]) for row in rows]),
        prompts=np.array([zlib.crc32(row["prompt"].encode()) for row in rows]),
        judge=np.array([float(row["judge"]) for row in rows]),
        length=np.array([float(row["length"]) for row in rows]),
        kl=np.array([number(row.get("kl")) for row in rows]),
        behaviour={key: np.array([number(row["behaviour"].get(key)) for row in rows]) for key in keys},
    )


def _take(answers: Answers, places: np.ndarray) -> Answers:
    return Answers(
        answers.index[places],
        answers.prompts[places],
        answers.judge[places],
        answers.length[places],
        answers.kl[places],
        {key: values[places] for key, values in answers.behaviour.items()},
    )
