"""The comparison of policies: they answer prompts, judges say who wins, and what can be counted is counted.

In the run's folder are ``answers/`` and ``verdicts/``, which are kept and added to; ``comparison.json``, every table;
``verdicts.jsonl``, a row for each verdict; and ``comparison.html``. A comparison that was stopped goes on where it was,
and one that has a new policy, set or judge asks only what is new.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrm import atomic
from jaxrm.comparison_config import check_comparison
from jaxrm.errors import UserError, option
from jaxrm.evaluation import comparison
from jaxrm.evaluation.refusals import is_refusal
from jaxrm.runtime.metrics import json_line
from jaxrm.stage_config import Compare
from jaxrm.stages.compare import judges, report
from jaxrm.stages.compare.answers import (
    AnswerKey,
    Answers,
    check_answer_files,
    check_policies,
    find_answers,
)
from jaxrm.stages.compare.judges import JudgedAnswer
from jaxrm.stages.compare.log_probs import free_memory
from jaxrm.stages.compare.measures import Comparison, Duel, tables_of
from jaxrm.stages.compare.prompts import PromptSet, read_prompt_set
from jaxrm.stages.compare.reference import measure_reference
from jaxrm.stages.compare.token_rewards import score_tokens
from jaxrm.stages.inspection import Inspection
from jaxrm.stages.stage import check_run_folder, open_run_folder

RESULT, VERDICTS, PAGE = "comparison.json", "verdicts.jsonl", "comparison.html"


def run(config: Compare) -> int:
    """Run the stage.

    Returns:
      Exit status 0.

    Raises:
      UserError: for what the user can mend, before anything is answered.
    """
    compare(config)
    return 0


def compare(config: Compare) -> Comparison:
    """Compare policies, print the tables and write the page.

    Args:
      config: of the stage; ``run_dir`` says where answers and verdicts are kept.

    Raises:
      UserError: as `run`.
    """
    sets = _check(config)
    judges.check_reachable(config)
    folder = open_run_folder(config)
    result = _compare(config, folder.path, sets)
    atomic.write_json(folder.path / RESULT, {name: list(rows) for name, rows in result.tables.items()})
    atomic.write_text(folder.path / VERDICTS, "".join(map(json_line, _verdict_rows(result))))
    report.print_tables(config, result)
    report.write(config, result, folder.path / PAGE, score_tokens(config, folder.path, sets, result.answers))
    print(f"The answers and verdicts are in {folder.path}; the page is {folder.path / PAGE}")
    return result


def inspect(config: Compare) -> Inspection:
    """What `run` would do; errors are the same, no weights are read and nothing is asked or written."""
    sets = _check(config)
    prompts = sum(len(each.prompts) for each in sets.values())
    runs = sum(1 + len(policy.seeds) for policy in config.policies.values())
    answers = prompts * runs * len(config.compare.decodings)
    duels = len(_pairs(config)) * prompts * len(config.compare.decodings)
    pairwise = [name for name, judge in config.judges.items() if judge.is_pairwise]
    facts = {
        "answers": f"{answers:,}, of up to {config.compare.sampling.max_new_tokens:,} tokens",
        "comparisons": f"{duels:,} pairs of answers for each of {len(config.judges)} judges",
    }
    if pairwise:
        facts["questions"] = f"at most {2 * duels:,} to each of {', '.join(pairwise)}, in both orders"
    return Inspection({f"Prompts of {name}": each.report for name, each in sets.items()}, facts=facts)


def _check(config: Compare) -> dict[str, PromptSet]:
    if jax.process_count() > 1:
        raise UserError("comparing policies is the work of one process; run it on one host")
    check_comparison(config)
    check_run_folder(config)
    check_policies(config)
    with_fields = any(judges.reads_fields(config, name) for name in config.judges)
    sets = {
        name: read_prompt_set(name, section, config.seed, with_fields=with_fields)
        for name, section in config.prompts.items()
    }
    check_answer_files(config, sets)
    unlabeled = [name for name, each in sets.items() if each.label is None]
    if config.compare.refusals and unlabeled:
        raise UserError(
            f"{option('compare.refusals')} is True, but the prompts {', '.join(unlabeled)} have no label; say whether "
            f"a good answer helps or refuses, e.g. --config.prompts.{unlabeled[0]}.label=harmless"
        )
    judges.check_judges(config, [prompt for each in sets.values() for prompt in each.prompts])
    return sets


def _pairs(config: Compare) -> list[tuple[str, str]]:
    """Names of the policies that are compared, the later one first."""
    names = list(config.policies)
    if config.compare.against == "first":
        return [(name, names[0]) for name in names[1:]]
    return [(name, other) for i, name in enumerate(names) for other in names[:i]]


def _compare(config: Compare, folder: Path, sets: Mapping[str, PromptSet]) -> Comparison:
    show_progress = config.logging.progress
    answers = find_answers(config, folder, sets, show_progress=show_progress)
    free_memory()
    reference = measure_reference(config, folder, sets, answers, show_progress=show_progress)
    free_memory()
    duels = []
    for name in config.judges:
        duels += _judge(config, name, folder, sets, answers)
        free_memory()
    result = Comparison(sets, answers, duels, _refused(config, folder, sets, answers), reference)
    return dataclasses.replace(result, tables=tables_of(result))


def _judged(
    sets: Mapping[str, PromptSet], answers: Answers, key: AnswerKey, *, with_fields: bool = False
) -> list[JudgedAnswer]:
    prompts, rows = sets[key.prompts], answers[key]
    fields = prompts.fields if with_fields and prompts.fields is not None else [None] * len(rows)
    every = zip(prompts.prompts, rows, fields, strict=True)
    return [JudgedAnswer(prompt, row["response"], columns) for prompt, row, columns in every]


def _judge(config: Compare, name: str, folder: Path, sets: Mapping[str, PromptSet], answers: Answers) -> list[Duel]:
    """What a judge says of every pair."""
    places = [
        (policy, other, prompts, decoding)
        for policy, other in _pairs(config)
        for prompts in sets
        for decoding in config.compare.decodings
    ]
    num_runs = 1 + max(len(policy.seeds) for policy in config.policies.values())
    with_fields = judges.reads_fields(config, name)
    sides = {
        place: [
            [
                _judged(sets, answers, AnswerKey(policy, run, *place[2:]), with_fields=with_fields)
                for run in range(num_runs)
            ]
            for policy in place[:2]
        ]
        for place in places
    }
    show_progress = config.logging.progress
    if not config.judges[name].is_pairwise:
        every = [answer for pair in sides.values() for runs in pair for run in runs for answer in run]
        scores = judges.score_answers(config, name, folder, every, show_progress=show_progress)

        def outcomes(place: tuple[str, str, str, str]) -> np.ndarray:
            ours, theirs = (np.array([[scores[x.key] for x in run] for run in side]) for side in sides[place])
            return np.where(ours == theirs, 0.5, (ours > theirs).astype(np.float64))

        return [Duel(*place, name, outcomes(place)) for place in places]
    pairs = [
        (a, b)
        for ours, theirs in sides.values()
        for run in zip(ours, theirs, strict=True)
        for a, b in zip(*run, strict=True)
    ]
    shares = judges.ask_pairs(config, name, folder, pairs, show_progress=show_progress)
    duels, start = [], 0
    for place in places:
        shape = (num_runs, len(sets[place[2]].prompts))
        first, second = shares[:, start : start + shape[0] * shape[1]]
        start += shape[0] * shape[1]
        table = comparison.pair_outcomes(first, second).reshape(shape)
        duels.append(Duel(*place, name, table, comparison.position_bias(first, second)))
    return duels


def _refused(
    config: Compare, folder: Path, sets: Mapping[str, PromptSet], answers: Answers
) -> dict[AnswerKey, np.ndarray]:
    """Whether each answer refuses, by a judge or by rules."""
    asker = config.compare.refusal_judge
    if asker is None:
        return {key: np.array([float(is_refusal(row["response"])) for row in rows]) for key, rows in answers.items()}
    judged = {key: _judged(sets, answers, key) for key in answers}
    every = [answer for rows in judged.values() for answer in rows]
    refused = judges.ask_refusals(config, asker, folder, every, show_progress=config.logging.progress)
    return {key: np.array([refused.get(row.key, np.nan) for row in rows], float) for key, rows in judged.items()}


def _verdict_rows(result: Comparison) -> Iterator[dict[str, Any]]:
    names = {1.0: "win", 0.5: "tie", 0.0: "loss"}
    for duel in result.duels:
        for run, outcomes in enumerate(duel.outcomes):
            for index, outcome in enumerate(outcomes):
                yield {
                    "policy": duel.policy,
                    "against": duel.other,
                    "prompts": duel.prompts,
                    "decoding": duel.decoding,
                    "judge": duel.judge,
                    "run": run,
                    "index": index,
                    "verdict": names.get(float(outcome)),
                }
