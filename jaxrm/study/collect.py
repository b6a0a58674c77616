"""Collect the results of a study from the folders of its runs.

STUDY/results/
  policies.jsonl    a row for each policy, split and decoding: means of its answers
  curves.jsonl      measurements along every training by rewards
  choices.jsonl     the setting of each protocol, world, arm and seed
  agreement.jsonl   how each reward model ranks held-out pairs
  win_rates.jsonl   every win rate, with its interval by itself and as one of many
"""

import itertools
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm.algorithms.best_of_n import kl_bound
from jaxrm.data import tasks
from jaxrm.runtime.metrics import read_rows
from jaxrm.stages.evaluate.run import ANSWERS
from jaxrm.study.arms import folder_name, read_arm
from jaxrm.study.config import BEST, Setting, Study, published, setting_name, settings
from jaxrm.study.results import Answers, Failure, JsonRow, Policy, PolicyKey, Results, as_float
from jaxrm.study.run_configs import REWARD_MODELS, answers_name, best_setting_name, policy_name
from jaxrm.study.schedule import Best, best_setting
from jaxrm.study.worlds import task_of, worlds_of

_EXAMPLE_PROMPTS = {"test": 8, "test_ood": 4}  # prompts of each split whose answers the report shows


def final_means(run: Path) -> dict[str, float]:
    """Means of a policy on the selection prompts: after training, or of the sampled answers; ``{}`` without any."""
    evaluation = _evaluation(run)
    means = evaluation.get("after") or evaluation.get("selection, sampled") or {}
    return {name: as_float(value) for name, value in means.items() if not isinstance(value, str)}


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
      done: names of the runs that are done.
      missing: names of those that are to come; a run that failed is not, nor one that needs it.
      best: the best checkpoint of each run of reinforcement learning that is done (`jaxrm.study.schedule`).
      seconds: that all runs took.
      failed: the runs that failed.
      blocked: names of the runs that could not start, since one that they need failed.
    """

    done: Collection[str]
    missing: Sequence[str]
    best: Mapping[str, Best]
    seconds: float
    failed: Sequence[Failure] = ()
    blocked: Sequence[str] = ()


def collect(study: Study, folder: Path, progress: Progress) -> Results:
    """Read the results of the runs that are done.

    Args:
      study: from `jaxrm.study.presets.apply_preset`.
      folder: of the study.
      progress: how far it is.
    """
    policies: dict[PolicyKey, Policy] = {}
    examples: dict[tuple[str, str, str], dict[str, JsonRow]] = {}
    agreement: list[JsonRow] = []
    sites = list(itertools.product(worlds_of(study), study.seeds or ()))
    for (world, seed), arm in itertools.product(sites, study.arms or ()):
        for policy, rows in _policies_of(study, folder / "runs", progress, (world, seed, arm)):
            policies[policy.key] = policy
            is_first = seed == (study.seeds or ())[0]
            if is_first and policy.key.setting == setting_name(published(study, arm)):
                _add_examples(examples, world, policy.key.arm, rows)
    for (world, seed), rm in itertools.product(sites, REWARD_MODELS):
        if f"{world}/seed{seed}/{rm}" in progress.done:
            agreement += _agreement_rows(folder / "runs", world, seed, rm)
    # A seed without the setting that failed would look better than it is: it counts as one that is to come.
    missing = _missing([*progress.missing, *(failure.name for failure in progress.failed), *progress.blocked])
    arms = [folder_name(arm) for arm in study.arms or ()]
    return Results(
        policies=policies,
        complete=frozenset(
            (world, arm, seed)
            for (world, seed), arm in itertools.product(sites, arms)
            if seed not in missing.get((world, arm), ())
        ),
        published={folder_name(arm): setting_name(published(study, arm)) for arm in study.arms or ()},
        blind_kl=study.blind_kl,
        agreement=agreement,
        examples=examples,
        missing=missing,
        failed=progress.failed,
    )


def _policies_of(
    study: Study, runs: Path, progress: Progress, site: tuple[str, int, str]
) -> Iterator[tuple[Policy, Sequence[JsonRow]]]:
    """The policies of an arm and seed in a world whose answers are there, with the rows of these."""
    world, seed, arm = site
    steps: dict[tuple[str, Setting], int | None] = {(setting_name(each), each): None for each in settings(study, arm)}
    chosen = best_setting(study, world, seed, arm, progress.best)
    if chosen is not None:
        steps[BEST, chosen] = progress.best[policy_name(world, seed, arm, chosen)].step
    for (name, setting), step in steps.items():
        answers = answers_name(world, seed, arm, name if step is None else best_setting_name(setting, step))
        if answers not in progress.done:
            continue
        rows = read_rows(runs / answers / ANSWERS)
        policy = _read_policy(study, runs, PolicyKey(world, folder_name(arm), seed, name), (arm, setting), rows)
        yield policy if step is None else _at_step(policy, step), rows


def _missing(names: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """The seeds of each world and arm some of whose answers are not there, of these runs."""
    missing: dict[tuple[str, str], list[int]] = {}
    for world, seed, *path in (name.split("/") for name in names):
        if path[0] == "answers":
            seeds = missing.setdefault((world, path[1]), [])
            seeds += [number] if (number := int(seed.removeprefix("seed"))) not in seeds else []
    return missing


def _read_policy(
    study: Study, runs: Path, key: PolicyKey, trained_as: tuple[str, Setting], rows: Sequence[JsonRow]
) -> Policy:
    """A policy with its answers, and with the curve of its training.

    Args:
      study: of the policy.
      runs: folder of its runs.
      key: of the policy.
      trained_as: arm and setting.
      rows: of its answers.
    """
    arm, setting = trained_as
    by_answers: dict[tuple[str, str], list[JsonRow]] = {}
    for row in rows:
        by_answers.setdefault((row["split"], row["decoding"]), []).append(row)
    answers = {name: _to_arrays(some) for name, some in by_answers.items() if name[0] != "selection"}
    if read_arm(arm) is None:
        selection = final_means(runs / answers_name(key.world, key.seed, arm, key.setting))
        if arm.startswith("best_of_n"):
            selection |= {"kl": kl_bound(study.best_of_n.best_of_n.n)}
        return Policy(key, selection, answers)
    trained = runs / policy_name(key.world, key.seed, arm, setting)
    return Policy(key, final_means(trained), answers, list(_curve(trained, key.world)))


def _at_step(policy: Policy, step: int) -> Policy:
    """The policy of a checkpoint, without the curve, which is there already."""
    (row,) = (row for row in policy.curve if row["step"] == step)
    selection = {name: as_float(row[name]) for name in ("judge", "kl", "reward", "length")}
    return Policy(policy.key, selection, policy.answers)


def _curve(run: Path, world: str) -> Iterator[JsonRow]:
    """What a training by rewards measured on the selection prompts while it went on."""
    behaviors = tasks.BEHAVIORS[task_of(world)]
    for row in read_rows(run / "metrics.jsonl"):
        if "eval_judge" in row:
            yield {
                "step": row["step"],
                **{name: row[f"eval_{name}"] for name in ("kl", "judge", "reward", "length")},
                "behaviour": {key: row[f"eval_{key}"] for key in behaviors if f"eval_{key}" in row},
            }


def _add_examples(
    examples: dict[tuple[str, str, str], dict[str, JsonRow]], world: str, arm: str, rows: Sequence[JsonRow]
) -> None:
    for row in rows:
        if row["decoding"] == "sampled" and row["index"] < _EXAMPLE_PROMPTS.get(row["split"], 0):
            examples.setdefault((world, row["split"], row["prompt"]), {})[arm] = row


def _agreement_rows(runs: Path, world: str, seed: int, rm: str) -> Iterator[JsonRow]:
    evaluation = _evaluation(runs / world / f"seed{seed}" / rm)
    fields = {"sum": "by_centered", "mean": "by_mean", "judge": "by_judge"}
    gains = evaluation.get("corrections", {})
    for kind in evaluation.get("kinds", []):
        shares = {name: kind[field][0] if field in kind else math.nan for name, field in fields.items()}
        yield {"world": world, "rm": rm, "seed": seed, "kind": kind["kind"], **shares, "corrections": gains}


def _evaluation(run: Path) -> dict[str, Any]:
    file = run / "evaluation.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _to_arrays(rows: Sequence[JsonRow]) -> Answers:
    behaviors = list(dict.fromkeys(name for row in rows for name in row["behaviour"]))
    return Answers(
        prompts=np.array([zlib.crc32(row["prompt"].encode()) for row in rows]),
        judge=np.array([float(row["judge"]) for row in rows]),
        length=np.array([float(row["length"]) for row in rows]),
        kl=np.array([as_float(row.get("kl")) for row in rows]),
        behavior={name: np.array([as_float(row["behaviour"].get(name)) for row in rows]) for name in behaviors},
    )
