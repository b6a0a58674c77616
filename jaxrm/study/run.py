"""Running a study: a queue of runs that survives being stopped, several at once, and what they come to.

In ``run_dir`` are ``study.json``, its config; ``queue.jsonl``, one line for each run that ended (the last one of a name
counts); ``runs/``, the folders of the runs, and ``logs/``, what they printed; ``results/``, see
`jaxrm.study.collect`; and ``report.html``. What is done is not run again; a run that failed is tried again by
the next launch.
"""

import dataclasses
import fcntl
import json
import math
import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.config import dicts
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime.metrics import append_row, read_rows
from jaxrm.runtime.preemption import EXIT_PREEMPTED, catch_signals
from jaxrm.runtime.progress import format_seconds, format_value
from jaxrm.runtime.run_folder import check_writable, checked_path, rename_aside, what_to_type
from jaxrm.study import collect as study_collect
from jaxrm.study import report as study_report
from jaxrm.study.config import PPO, Study, shrunk
from jaxrm.study.schedule import Run, folder_of, plan
from jaxrm.study.tuning import Choice
from jaxrm.study.worker_pool import EXIT_FAILED, Ended, Worker, workers

_RECORD, _QUEUE = "study.json", "queue.jsonl"
_LOCK = ".lock"
# What may change between launches: which runs there are, and how many at once, but not what any of them is.
_MAY_DIFFER = (
    "run_dir",
    "on_existing",
    "worlds",
    "arms",
    "seeds",
    "selection_seeds",
    "workers",
    "extensions",
    "tolerance",
)


def run(config: Study) -> int:
    """Run what is left of a study, and say what came of it.

    Returns:
      Exit status: 0 when all runs are done, `EXIT_FAILED` when some failed, `EXIT_PREEMPTED` when it was asked to stop.

    Raises:
      UserError: for a folder that holds another study, and says in what.
    """
    folder = _open(config)
    with _alone(folder):
        return _run(config, folder)


def _run(config: Study, folder: Path) -> int:
    study = shrunk(dataclasses.replace(config, run_dir=str(folder)))
    records = {row["name"]: row for row in read_rows(folder / _QUEUE)}
    failed_before = [name for name, row in records.items() if row["state"] == "failed"]
    for name in failed_before:
        del records[name]
    if failed_before:
        print(f"{len(failed_before)} runs failed before and are tried again")
    status = _work(study, folder, records)
    runs, choices = _planned(study, records)
    done = {name for name, row in records.items() if row["state"] == "done"}
    study_collect.collect(study, folder, [run for run in runs if run.name in done], choices)
    about = [("Folder", str(folder)), ("Worlds", ", ".join(study.worlds)), ("Policy", f"{study.size}")]
    about += [("Seeds", f"{len(study.seeds)}, settings chosen with {len(study.selection_seeds)} other")]
    about += [("Time of all runs", format_seconds(sum(row["seconds"] for row in records.values())))]
    expected = [(world, folder_of(arm), seed) for world in study.worlds for arm in study.arms for seed in study.seeds]
    study_report.close(folder, about=about, expected=expected)
    failed = [row for row in records.values() if row["state"] == "failed"]
    for row in failed:
        print(f"failed: {row['name']}: {row['error']} (what it printed: {_log(folder, row['name'])})")
    if failed:
        skipped = [run.name for run in runs if run.name not in records]
        print(f"{len(failed)} runs failed, {len(skipped)} could not start for it; the same command tries them again")
    return status or (EXIT_FAILED if failed else 0)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse to work beside another launch of the same study."""
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{option('run_dir')} is {str(folder)!r}, where this study is running already; wait for it or stop it, "
                f"or use another folder, e.g. {flag('run_dir')}={folder}-2"
            ) from error
        yield


def _open(config: Study) -> Path:
    """The folder of the study, with its record; refuses that of another study."""
    path = checked_path(config.run_dir)
    check_writable(path, config.run_dir)
    resolved = dicts.as_dict(config)
    entries = [entry.name for entry in path.iterdir()] if path.exists() else []
    names = sorted(name for name in entries if name != _LOCK and not atomic.is_unfinished(name))
    if names and _RECORD not in names and config.on_existing != "restart":
        raise UserError(
            f"{option('run_dir')} is {config.run_dir!r}, which is no study but holds {names[0]!r}; required an "
            f"empty or a "
            f"new folder, e.g. {flag('run_dir')}={config.run_dir.rstrip('/')}-2"
        )
    if names and config.on_existing == "error":
        raise UserError(f"{config.run_dir} holds a study; {what_to_type(config.run_dir, ('resume', 'restart'))}")
    if names and config.on_existing == "restart":
        print(f"{config.run_dir} is new; what was there is now {rename_aside(path)}")
    elif names:
        try:
            found = json.loads((path / _RECORD).read_text(encoding="utf-8"))["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path / _RECORD} cannot be read ({error}); {what_to_type(config.run_dir, ('restart',))}"
            ) from error
        changed = [
            f"{option(name)} was {old!r} and is {new!r}"
            for name, old, new in dicts.differences(found, resolved)
            if name.split(".")[0] not in _MAY_DIFFER
        ]
        if changed:
            more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{option('run_dir')} is {config.run_dir!r}, which holds another study: "
                f"{', '.join(changed[:3])}{more}; "
                f"{what_to_type(config.run_dir, ('restart',))}"
            )
        print(f"{config.run_dir} holds this study; continuing it")
    path.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path / _RECORD, {"config": resolved})
    return path


def _work(study: Study, folder: Path, records: dict[str, dict[str, Any]]) -> int:
    """Keep the workers busy until nothing is left that can start; 0, or `EXIT_PREEMPTED`."""
    ended: queue.Queue[Ended] = queue.Queue()
    busy: dict[Worker, str] = {}
    with catch_signals() as stop, workers(study.workers, folder, ended) as every:
        idle = list(every)
        while True:
            runs, _ = _planned(study, records)
            waiting = [
                run
                for run in runs
                if run.name not in records
                and run.name not in busy.values()
                and all(records.get(name, {}).get("state") == "done" for name in run.needs)
            ]
            while idle and waiting and not stop.requested:
                worker, next_run = idle.pop(), waiting.pop(0)
                worker.start(next_run, _log(folder, next_run.name))
                busy[worker] = next_run.name
            if not busy:
                return EXIT_PREEMPTED if waiting else 0
            if stop.requested:
                for worker in busy:
                    worker.stop()
            try:
                one = ended.get(timeout=0.5)
            except queue.Empty:
                continue
            name = busy.pop(one.worker)
            idle.append(one.worker)
            if one.status == EXIT_PREEMPTED:
                continue
            row = {"name": name, "state": "failed" if one.status else "done", "seconds": round(one.seconds, 1)}
            if one.status:
                row["error"] = one.error
            else:
                score = study_collect.score_of(folder / "runs" / name)
                row |= {} if score is None else {"score": score}
            append_row(folder / _QUEUE, row)
            records[name] = row
            print(_line(study, row, *_planned(study, records), records, len(every)), flush=True)


def _planned(study: Study, records: Mapping[str, Mapping[str, Any]]) -> tuple[list[Run], dict[tuple[str, str], Choice]]:
    """The plan, in which what cannot run, since something that it needs failed, has failed too."""
    scores = {name: float(row["score"]) for name, row in records.items() if row.get("score") is not None}
    lost = {name for name, row in records.items() if row["state"] == "failed"}
    while True:
        runs, choices = plan(study, scores | dict.fromkeys(lost, math.nan))
        more = {run.name for run in runs if lost & set(run.needs)} - lost
        if not more:
            return runs, choices
        lost |= more


def _line(
    study: Study,
    row: Mapping[str, Any],
    runs: Sequence[Run],
    choices: Mapping[tuple[str, str], Choice],
    records: Mapping[str, Mapping[str, Any]],
    worker_count: int,
) -> str:
    """One line for a run that ended: how far the study is, what it was, and how long the rest may take."""
    # Of arms whose settings are not chosen yet the final runs are unknown, but not how many there will be.
    open_arms = [arm for (_, arm), choice in choices.items() if choice.wanted]
    left = [run.name for run in runs if run.name not in records]
    left += [name for arm in open_arms for _ in study.seeds for name in (f"//{arm}", "//answers")]
    spent: dict[str, list[float]] = {}
    for each in records.values():
        spent.setdefault(_sort(each["name"]), []).append(each["seconds"])
    every = [seconds for of_sort in spent.values() for seconds in of_sort]
    known = {sort: sum(seconds) / len(seconds) for sort, seconds in spent.items()}
    rest = sum(known.get(_sort(name), sum(every) / len(every)) for name in left) / worker_count
    said = f" · judge {format_value(row['score'])}" if row.get("score") is not None else ""
    said += f" · failed: {row['error']}" if row["state"] == "failed" else ""
    about = f" · about {format_seconds(rest)} left" if left else ""
    total = len(records) + len(left)
    return f"{len(records):,}/{total:,} {row['name']} in {format_seconds(row['seconds'])}{said}{about}"


def _sort(name: str) -> str:
    """What takes about as long as what: all answers, all runs of PPO, and so on."""
    parts = name.split("/")[2:]
    if "answers" in parts:
        return "answers"
    what = parts[1] if parts[0] == "select" else parts[0]
    return PPO if what.startswith(PPO) else what


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"
