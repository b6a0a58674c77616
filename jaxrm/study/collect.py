"""From the folders of a study's runs to its results.

STUDY/results/
  <world>/<arm>/seed<k>.jsonl   one row per answer to a test prompt
  results.jsonl                 one row per world, arm, seed, split and decoding: means
  curves.jsonl                  what was measured along the training of the final runs
  selection.jsonl               each setting that was tried, with its score
  agreement.jsonl               how each reward model ranks held-out pairs
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.algorithms.best_of_n import kl_bound
from jaxrm.data import tasks
from jaxrm.runtime.metrics import json_line, read_rows
from jaxrm.stages.evaluate.run import ALONG, ANSWERS
from jaxrm.study.config import PPO, Study, axes
from jaxrm.study.schedule import Run, answers_name, folder_of, policy_name, selection_run, watched
from jaxrm.study.tuning import Choice

Row = dict[str, Any]


def score_of(folder: Path) -> float | None:
    """The mean mark of the exact judge on a run's prompts, sampled; None for a run that has none."""
    return _of(_evaluation(folder), "judge")


def collect(study: Study, folder: Path, done: Sequence[Run], choices: Mapping[tuple[str, str], Choice]) -> None:
    """Write the results of the runs that are done, all anew.

    Args:
      study: from `jaxrm.study.config.shrunk`.
      folder: of the study.
      done: its runs that are done.
      choices: what came of choosing settings, by world and arm.
    """
    results, part, names = folder / "results", folder / ".results.part", {run.name for run in done}
    shutil.rmtree(part, ignore_errors=True)
    rows: dict[str, list[Row]] = {"results": [], "curves": [], "selection": [], "agreement": []}
    for world in study.worlds:
        for arm in study.arms:
            rows["selection"] += _selection(study, folder, world, arm, choices[world, arm])
            chosen = choices[world, arm].chosen
            for seed in study.seeds if chosen is not None else ():
                where = {"world": world, "arm": folder_of(arm), "seed": seed}
                answers = answers_name(world, seed, arm, chosen or ())
                if answers in names:
                    given = [
                        row for row in read_rows(folder / "runs" / answers / ANSWERS) if row["split"] != "selection"
                    ]
                    text = "".join(json_line(row) for row in given)
                    atomic.write_text(part / world / folder_of(arm) / f"seed{seed}.jsonl", text)
                    means = _evaluation(folder / "runs" / answers)
                    for name, of in means.items():
                        split, decoding = name.split(", ")
                        rows["results"].append(
                            {**where, **dict(chosen or ()), "split": split, "decoding": decoding, **of}
                        )
                    if watched(arm):
                        rows["curves"] += _along(where, dict(chosen or ()), folder / "runs" / answers)
                    elif not arm.startswith(PPO) and "selection, sampled" in means:
                        end = means["selection, sampled"]
                        if arm.startswith("best_of_n"):
                            end["kl"] = kl_bound(study.best_of_n.best_of_n.n)
                        rows["curves"].append(_point(where, dict(chosen or ()), 0, end))
                policy = policy_name(world, seed, arm, chosen or ())
                if arm.startswith(PPO) and policy in names:
                    rows["curves"] += _curve(where, dict(chosen or ()), folder / "runs" / policy)
        for seed in study.seeds:
            for rm in ("rm_scalar", "rm_seq2seq"):
                if f"{world}/seed{seed}/{rm}" in names:
                    rows["agreement"] += _agreement(world, seed, rm, folder / "runs" / world / f"seed{seed}" / rm)
    rows["curves"] = _ends_together(rows["curves"])
    for file, found in rows.items():
        atomic.write_text(part / f"{file}.jsonl", "".join(json_line(row) for row in found))
    shutil.rmtree(results, ignore_errors=True)  # all of it can be made again from the runs
    part.rename(results)


def _curve(where: Mapping[str, Any], chosen: Mapping[str, float], run: Path) -> Iterable[Row]:
    for row in read_rows(run / "metrics.jsonl"):
        if "eval_judge" in row:
            behaviours = tasks.BEHAVIOURS[where["world"]]
            yield {
                **where,
                "beta": chosen.get("ppo.kl_coef"),
                "lr": chosen.get("optimizer.lr"),
                "step": row["step"],
                **{name: row[f"eval_{name}"] for name in ("kl", "judge", "reward", "length")},
                "behaviour": {key: row[f"eval_{key}"] for key in behaviours if f"eval_{key}" in row},
            }


def _along(where: Mapping[str, Any], chosen: Mapping[str, float], run: Path) -> Iterable[Row]:
    return [_point(where, chosen, row["step"], row) for row in read_rows(run / ALONG)]


def _ends_together(rows: Sequence[Row]) -> list[Row]:
    """The last row of every arm and seed at the last step of the arm, so that ends are compared with ends.

    Data differ in size from seed to seed, and with them the steps of a run.
    """
    last: dict[tuple[str, str, int | None], int] = {}
    for row in rows:
        for seed in (row["seed"], None):
            name = row["world"], row["arm"], seed
            last[name] = max(row["step"], last.get(name, 0))

    def is_end(row: Row) -> bool:
        return bool(row["step"] == last[row["world"], row["arm"], row["seed"]])

    return [row | {"step": last[row["world"], row["arm"], None]} if is_end(row) else row for row in rows]


def _point(where: Mapping[str, Any], chosen: Mapping[str, float], step: int, means: Mapping[str, float]) -> Row:
    """What a policy gives that does not watch itself in training; of the best of n the KL is an upper bound."""
    behaviours = tasks.BEHAVIOURS[where["world"]]
    return {
        **where,
        "beta": chosen.get("dpo.beta"),
        "lr": chosen.get("optimizer.lr"),
        "step": step,
        "kl": means["kl"],
        "judge": means["judge"],
        "reward": means.get("reward", math.nan),
        "length": means["length"],
        "behaviour": {key: means[key] for key in behaviours if key in means},
    }


def _selection(study: Study, folder: Path, world: str, arm: str, choice: Choice) -> Iterable[Row]:
    if not axes(study, arm):
        return
    for setting in choice.scores:
        for seed in study.selection_seeds:
            run = folder / "runs" / selection_run(study, world, seed, arm, setting).name
            found = _evaluation(run) if (run / "evaluation.json").exists() else {}
            score, kl = _of(found, "judge"), _of(found, "kl")
            yield {
                "world": world,
                "arm": folder_of(arm),
                "seed": seed,
                "settings": {name.rsplit(".", 1)[-1]: value for name, value in setting},
                "score": math.nan if score is None else score,
                "kl": math.nan if kl is None else kl,
                "chosen": setting == choice.chosen,
                "at_edge": choice.at_edge,
            }


def _agreement(world: str, seed: int, rm: str, run: Path) -> Iterable[Row]:
    found = _evaluation(run)
    for kind in found.get("kinds", []):
        ways = {"sum": "by_centered", "mean": "by_mean", "judge": "by_judge"}
        shares = {way: kind[name][0] if name in kind else math.nan for way, name in ways.items()}
        yield {"world": world, "rm": rm, "seed": seed, "kind": kind["kind"], **shares, "pairs": found["pairs"]}


def _evaluation(run: Path) -> dict[str, Any]:
    file = run / "evaluation.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _of(evaluation: Mapping[str, Any], name: str) -> float | None:
    """A mean after training of a PPO run, or of the sampled answers of an evaluation to the selection prompts."""
    means = evaluation.get("after") or evaluation.get("selection, sampled") or {}
    return None if means.get(name) is None else float(means[name])
