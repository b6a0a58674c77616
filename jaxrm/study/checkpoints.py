"""Which parameters of a study's runs stay on the disk: the best checkpoint and the last, while they are needed."""

import shutil
from collections.abc import Container, Iterable
from pathlib import Path

from jaxrm.runtime.metrics import read_rows
from jaxrm.study.run_configs import StudyRun
from jaxrm.study.schedule import Best


def keep_best(run: Path) -> Best | None:
    """Of a run of reinforcement learning, remove the checkpoints between the best one and the last.

    Args:
      run: folder of a run that is done.

    Returns:
      The checkpoint with the highest judge score, of those after the first step; None for a run of another sort.
    """
    scores = {row["step"]: row["eval_judge"] for row in read_rows(run / "metrics.jsonl") if "eval_judge" in row}
    steps = sorted(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))
    scored = [step for step in steps if step > 0 and step in scores]
    if not scored or scored[-1] != steps[-1]:
        return None
    best = max(scored, key=lambda step: scores[step])  # of equal ones the first, which moved less
    for step in steps:
        if step not in (best, steps[-1]):
            shutil.rmtree(run / "checkpoints" / str(step))
    return Best(scores[best], best, best == steps[-1])


def remove_unneeded(folder: Path, name: str, runs: Iterable[StudyRun], done: Container[str]) -> None:
    """Remove the parameters of arms when every run that needs them is done.

    Args:
      folder: of the study.
      name: of the run that ended.
      runs: of the study.
      done: names of the runs that are done; one that failed is not, since the next launch tries it again.
    """
    runs = list(runs)
    arm = _arm(name)
    if arm is None:
        return
    if any(_arm(run.name) == arm and run.name not in done for run in runs):
        return  # the best checkpoint of an arm is known when all of its settings are done
    needed = {need for run in runs if run.name not in done for need in run.needs}
    for run in runs:
        if _arm(run.name) == arm and run.name not in needed:
            shutil.rmtree(folder / "runs" / run.name / "checkpoints", ignore_errors=True)


def _arm(name: str) -> tuple[str, ...] | None:
    """World, seed and arm of a run; None for a run that all arms share."""
    parts = name.split("/")
    if len(parts) < 4:
        return None
    return (*parts[:2], parts[3] if parts[2] in ("answers", "mechanism") else parts[2])
