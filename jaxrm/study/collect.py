"""Collect the results of a study from the folders of its runs.

STUDY/results/
  <world>/<arm>/seed<k>.jsonl   one row per answer to a test prompt
  results.jsonl                 one row per world, arm, seed, split and decoding: means
  curves.jsonl                  measurements along the training of the final runs
  selection.jsonl               each setting that was tried, with its score
  agreement.jsonl               how each reward model ranks held-out pairs
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.algorithms.best_of_n import kl_bound
from jaxrm.data import tasks
from jaxrm.runtime.metrics import json_line, read_rows
from jaxrm.stages.evaluate.run import ANSWERS, CHECKPOINT_MEANS
from jaxrm.study.config import PPO, Study, axes
from jaxrm.study.schedule import (
    REWARD_MODELS,
    Choices,
    StudyRun,
    answers_name,
    evaluates_checkpoints,
    folder_name,
    policy_name,
    selection_run,
)
from jaxrm.study.tuning import Choice, Setting

JsonRow = dict[str, Any]


def judge_score(folder: Path) -> float | None:
    """The mean judge score of a run's sampled answers to the selection prompts; None for a run that has none."""
    return _selection_mean(_evaluation(folder), "judge")


def collect(study: Study, folder: Path, done: Sequence[StudyRun], choices: Choices) -> None:
    """Write the results of the runs that are done, all anew.

    Args:
      study: from `jaxrm.study.config.apply_preset`.
      folder: of the study.
      done: its runs that are done.
      choices: the state of tuning, by world and arm.
    """
    results, part, names = folder / "results", folder / ".results.part", {run.name for run in done}
    shutil.rmtree(part, ignore_errors=True)
    tables: dict[str, list[JsonRow]] = {"results": [], "curves": [], "selection": [], "agreement": []}
    for world in study.worlds:
        for arm in study.arms:
            tables["selection"] += _selection_rows(study, folder, world, arm, choices[world, arm])
            setting = choices[world, arm].chosen
            for seed in study.seeds if setting is not None else ():
                final = _FinalRun(study, folder / "runs", world, arm, seed, setting or ())
                if final.answers in names:
                    _copy_answers(final, part)
                    tables["results"] += _mean_rows(final)
                    tables["curves"] += _answer_points(final)
                if arm.startswith(PPO) and final.policy in names:
                    tables["curves"] += _ppo_points(final)
        for seed in study.seeds:
            for rm in REWARD_MODELS:
                if f"{world}/seed{seed}/{rm}" in names:
                    tables["agreement"] += _agreement_rows(folder / "runs", world, seed, rm)
    tables["curves"] = _align_ends(tables["curves"])
    for name, rows in tables.items():
        atomic.write_text(part / f"{name}.jsonl", "".join(json_line(row) for row in rows))
    shutil.rmtree(results, ignore_errors=True)  # safe, since all of it can be made again from the runs
    part.rename(results)


@dataclass(frozen=True)
class _FinalRun:
    """The final runs of an arm in a world, with one seed."""

    study: Study
    runs: Path
    world: str
    arm: str
    seed: int
    setting: Setting

    @property
    def key(self) -> JsonRow:
        """The fields that every row of results begins with."""
        return {"world": self.world, "arm": folder_name(self.arm), "seed": self.seed}

    @property
    def answers(self) -> str:
        return answers_name(self.world, self.seed, self.arm, self.setting)

    @property
    def policy(self) -> str:
        return policy_name(self.world, self.seed, self.arm, self.setting)


def _copy_answers(final: _FinalRun, results: Path) -> None:
    """Copy the answers to the test prompts; those to the selection prompts are not for reports."""
    rows = [row for row in read_rows(final.runs / final.answers / ANSWERS) if row["split"] != "selection"]
    file = results / final.world / folder_name(final.arm) / f"seed{final.seed}.jsonl"
    atomic.write_text(file, "".join(json_line(row) for row in rows))


def _mean_rows(final: _FinalRun) -> Iterator[JsonRow]:
    for name, means in _evaluation(final.runs / final.answers).items():
        split, decoding = name.split(", ")
        yield {**final.key, **dict(final.setting), "split": split, "decoding": decoding, **means}


def _answer_points(final: _FinalRun) -> Iterator[JsonRow]:
    """Points of a curve that come from answers: of each checkpoint, or of the policy of an arm that trains nothing."""
    if evaluates_checkpoints(final.arm):
        for row in read_rows(final.runs / final.answers / CHECKPOINT_MEANS):
            yield _curve_point(final, row["step"], row)
        return
    means = _evaluation(final.runs / final.answers).get("selection, sampled")
    if means is not None and not final.arm.startswith(PPO):
        if final.arm.startswith("best_of_n"):
            means = means | {"kl": kl_bound(final.study.best_of_n.best_of_n.n)}
        yield _curve_point(final, 0, means)


def _curve_point(final: _FinalRun, step: int, means: Mapping[str, float]) -> JsonRow:
    behaviors = tasks.BEHAVIORS[final.world]
    setting = dict(final.setting)
    return {
        **final.key,
        "beta": setting.get("dpo.beta"),
        "lr": setting.get("optimizer.lr"),
        "step": step,
        "kl": means["kl"],
        "judge": means["judge"],
        "reward": means.get("reward", math.nan),
        "length": means["length"],
        "behaviour": {key: means[key] for key in behaviors if key in means},
    }


def _ppo_points(final: _FinalRun) -> Iterator[JsonRow]:
    """Points of a curve that PPO measured while it trained."""
    behaviors = tasks.BEHAVIORS[final.world]
    setting = dict(final.setting)
    for row in read_rows(final.runs / final.policy / "metrics.jsonl"):
        if "eval_judge" in row:
            yield {
                **final.key,
                "beta": setting.get("ppo.kl_coef"),
                "lr": setting.get("optimizer.lr"),
                "step": row["step"],
                **{name: row[f"eval_{name}"] for name in ("kl", "judge", "reward", "length")},
                "behaviour": {key: row[f"eval_{key}"] for key in behaviors if f"eval_{key}" in row},
            }


def _align_ends(rows: Sequence[JsonRow]) -> list[JsonRow]:
    """Move the last row of every arm and seed to the last step of the arm, so that ends are compared with ends.

    Data differ in size from seed to seed, and so does the number of steps in a run.
    """
    last_of_seed: dict[tuple[str, str, int], int] = {}
    last_of_arm: dict[tuple[str, str], int] = {}
    for row in rows:
        arm, seed = (row["world"], row["arm"]), (row["world"], row["arm"], row["seed"])
        last_of_seed[seed] = max(row["step"], last_of_seed.get(seed, 0))
        last_of_arm[arm] = max(row["step"], last_of_arm.get(arm, 0))
    return [
        row | {"step": last_of_arm[row["world"], row["arm"]]}
        if row["step"] == last_of_seed[row["world"], row["arm"], row["seed"]]
        else row
        for row in rows
    ]


def _selection_rows(study: Study, folder: Path, world: str, arm: str, choice: Choice) -> Iterator[JsonRow]:
    if not axes(study, arm):
        return
    for setting in choice.scores:
        for seed in study.selection_seeds:
            evaluation = _evaluation(folder / "runs" / selection_run(study, world, seed, arm, setting).name)
            score, kl = _selection_mean(evaluation, "judge"), _selection_mean(evaluation, "kl")
            yield {
                "world": world,
                "arm": folder_name(arm),
                "seed": seed,
                "settings": {name.rsplit(".", 1)[-1]: value for name, value in setting},
                "score": math.nan if score is None else score,
                "kl": math.nan if kl is None else kl,
                "chosen": setting == choice.chosen,
                "at_edge": choice.at_edge,
            }


def _agreement_rows(runs: Path, world: str, seed: int, rm: str) -> Iterator[JsonRow]:
    evaluation = _evaluation(runs / world / f"seed{seed}" / rm)
    fields = {"sum": "by_centered", "mean": "by_mean", "judge": "by_judge"}
    for kind in evaluation.get("kinds", []):
        shares = {name: kind[field][0] if field in kind else math.nan for name, field in fields.items()}
        yield {"world": world, "rm": rm, "seed": seed, "kind": kind["kind"], **shares, "pairs": evaluation["pairs"]}


def _evaluation(run: Path) -> dict[str, Any]:
    file = run / "evaluation.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _selection_mean(evaluation: Mapping[str, Any], name: str) -> float | None:
    """A mean on the selection prompts: after training of a PPO run, or of the sampled answers of an evaluation."""
    means = evaluation.get("after") or evaluation.get("selection, sampled") or {}
    return None if means.get(name) is None else float(means[name])
