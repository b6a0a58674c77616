"""Run a study: a queue of runs, several at once, which can be stopped at any time and continued.

The study's folder holds

- ``study.json``: its config;
- ``queue.jsonl``: one line for each run that ended; the last line of a name counts;
- ``runs/`` and ``logs/``: the folders of the runs, and what they printed;
- ``results/``: see `jaxrm.study.collect`;
- ``win_rates.jsonl`` and ``report.html``.

Runs that are done are not repeated. A run that failed is tried again by the next launch.
"""

import dataclasses
import json
import math
import queue
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.config import dicts
from jaxrm.config.recorded import upgraded
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime import run_lock
from jaxrm.runtime.folders import check_writable, checked_path, rename_aside, unusable, what_to_type
from jaxrm.runtime.metrics import append_row, read_rows
from jaxrm.runtime.preemption import EXIT_PREEMPTED, catch_signals
from jaxrm.runtime.progress import format_seconds, format_value
from jaxrm.runtime.provenance import code_digest
from jaxrm.runtime.run_record import is_same_launch, now
from jaxrm.study.collect import collect, judge_score
from jaxrm.study.config import PPO, Study, apply_preset
from jaxrm.study.report import publish
from jaxrm.study.schedule import Choices, StudyRun, folder_name, schedule
from jaxrm.study.worker_pool import EXIT_FAILED, Outcome, Worker, open_workers

_RECORD, _QUEUE = "study.json", "queue.jsonl"
# What may change between launches: which runs there are and how many at once, but not what any of them is.
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

RunRecords = dict[str, dict[str, Any]]
"""Rows of ``queue.jsonl`` by the name of the run: ``state``, ``seconds``, and ``score`` or ``error``."""


def run_study(config: Study) -> int:
    """Run what is left of a study, then print its tables and write its report.

    Returns:
      Exit status: 0 when all runs are done, `EXIT_FAILED` when some failed, `EXIT_PREEMPTED` when it was stopped.

    Raises:
      UserError: the folder holds another study; the message names the differences.
    """
    with run_lock.given_back():
        folder = _open(config)
        study = apply_preset(dataclasses.replace(config, run_dir=str(folder)))
        records = _read_records(folder)
        status = _run_queue(study, folder, records)
        _publish(study, folder, records)
        failed = _print_failures(study, folder, records)
        if not (status or failed):
            _write_record(folder, {**_read_record(folder / _RECORD, config.run_dir), "ended": now()})
    return status or failed


def _read_records(folder: Path) -> RunRecords:
    """Records of earlier launches, without the runs that failed, so that these are tried again."""
    records = {row["name"]: row for row in read_rows(folder / _QUEUE)}
    failed = [name for name, row in records.items() if row["state"] == "failed"]
    if failed:
        print(f"{len(failed)} runs failed before and are tried again")
    return {name: row for name, row in records.items() if name not in failed}


def _publish(study: Study, folder: Path, records: RunRecords) -> None:
    runs, choices = _schedule(study, records)
    done = [run for run in runs if records.get(run.name, {}).get("state") == "done"]
    collect(study, folder, done, choices)
    seconds = sum(row["seconds"] for row in records.values())
    about = [
        ("Folder", str(folder)),
        ("Worlds", ", ".join(study.worlds)),
        ("Policy", study.size),
        ("Seeds", f"{len(study.seeds)}, settings chosen with {len(study.selection_seeds)} other"),
        ("Time of all runs", format_seconds(seconds)),
    ]
    expected = [(world, folder_name(arm), seed) for world in study.worlds for arm in study.arms for seed in study.seeds]
    publish(folder, about=about, expected=expected)


def _print_failures(study: Study, folder: Path, records: RunRecords) -> int:
    """Print the runs that failed; return `EXIT_FAILED`, or 0 where there are none."""
    failed = [row for row in records.values() if row["state"] == "failed"]
    for row in failed:
        print(f"failed: {row['name']}: {row['error']} (its output: {_log(folder, row['name'])})")
    if not failed:
        return 0
    runs, _ = _schedule(study, records)
    blocked = sum(run.name not in records for run in runs)
    print(f"{len(failed)} runs failed, and {blocked} that need them could not start; the same command tries them again")
    return EXIT_FAILED


def _open(config: Study) -> Path:
    """Make the folder of the study, lock it and write its record; refuse the folder of another study."""
    path, run_dir = checked_path(config.run_dir), config.run_dir
    check_writable(path, run_dir)
    run_lock.check_free(path, run_dir)
    resolved = dicts.to_dict(config)
    entries = [entry.name for entry in path.iterdir()] if path.exists() else []
    names = sorted(name for name in entries if not run_lock.is_no_content(name))
    if names and _RECORD not in names and config.on_existing != "restart":
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which is no study but holds {names[0]!r}; required an empty or a new "
            f"folder, e.g. {flag('run_dir')}={run_dir.rstrip('/')}-2"
        )
    if names and config.on_existing == "error":
        raise UserError(f"{run_dir} holds a study; {what_to_type(run_dir, ('resume', 'restart'))}")
    restarts = bool(names) and config.on_existing == "restart" and not _is_same_launch(path, resolved)
    if names and not restarts:
        _check_same_study(path / _RECORD, run_dir, resolved)
        print(f"{run_dir} holds this study; continuing it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        run_lock.take(path, run_dir)
        if restarts:
            run_lock.give_back(path)
            print(f"{run_dir} is new; what was there is now {rename_aside(path)}")
            path.mkdir()
            run_lock.take(path, run_dir)
        atomic.remove_unfinished(path)
        _write_record(path, {"config": resolved, "code": code_digest()})
    except OSError as error:
        raise unusable(run_dir, str(error.strerror)) from error
    return path


def _is_same_launch(path: Path, resolved: Mapping[str, Any]) -> bool:
    """Whether this very command began the study and was stopped (`jaxrm.runtime.run_record.is_same_launch`)."""
    try:
        record = _read_record(path / _RECORD, str(path))
    except UserError:
        return False
    return is_same_launch({"config": record["config"], "launches": [record]}, resolved)


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    atomic.write_json(path / _RECORD, record)


def _read_record(path: Path, run_dir: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "config": dict(record["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {what_to_type(run_dir, ('restart',))}") from error


def _check_same_study(record: Path, run_dir: str, resolved: Mapping[str, Any]) -> None:
    """Refuse to continue a study whose config differs in more than which runs there are."""
    previous = _read_record(record, run_dir)["config"]
    changes = [
        f"{option(name)} was {old!r} and is {new!r}"
        for name, old, new in dicts.differences(upgraded(previous, resolved), resolved)
        if name.split(".")[0] not in _MAY_DIFFER
    ]
    if changes:
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which holds another study: {', '.join(changes[:3])}{more}; "
            f"{what_to_type(run_dir, ('restart',))}"
        )


def _run_queue(study: Study, folder: Path, records: RunRecords) -> int:
    """Keep the workers busy until no run can start; return 0, or `EXIT_PREEMPTED` when the study was stopped."""
    outcomes: queue.Queue[Outcome] = queue.Queue()
    busy: dict[Worker, str] = {}
    with catch_signals() as stop, open_workers(study.workers, folder, outcomes) as workers:
        idle = list(workers)
        while True:
            runs, _ = _schedule(study, records)
            ready = _ready(runs, records, busy.values())
            while idle and ready and not stop.requested:
                worker, next_run = idle.pop(), ready.pop(0)
                worker.start(next_run, _log(folder, next_run.name))
                busy[worker] = next_run.name
            if not busy:
                return EXIT_PREEMPTED if ready else 0
            if stop.requested:
                for worker in busy:
                    worker.stop()
            try:
                outcome = outcomes.get(timeout=0.5)  # so that a signal is seen while the runs go on
            except queue.Empty:
                continue
            name = busy.pop(outcome.worker)
            idle.append(outcome.worker)
            if outcome.status != EXIT_PREEMPTED:
                records[name] = _record(folder, name, outcome)
                append_row(folder / _QUEUE, records[name])
                print(_progress_line(study, records, name, len(workers)), flush=True)


def _ready(runs: Iterable[StudyRun], records: RunRecords, running: Iterable[str]) -> list[StudyRun]:
    """The runs that can start now: all that they need is done."""
    started = {*records, *running}
    done = {name for name, row in records.items() if row["state"] == "done"}
    return [run for run in runs if run.name not in started and done.issuperset(run.needs)]


def _record(folder: Path, name: str, outcome: Outcome) -> dict[str, Any]:
    """The row of ``queue.jsonl`` for a run that ended."""
    row: dict[str, Any] = {
        "name": name,
        "state": "failed" if outcome.status else "done",
        "seconds": round(outcome.seconds, 1),
    }
    if outcome.status:
        return row | {"error": outcome.error}
    score = judge_score(folder / "runs" / name)
    return row if score is None else row | {"score": score}


def _schedule(study: Study, records: RunRecords) -> tuple[list[StudyRun], Choices]:
    """The schedule, in which a run whose needs failed counts as failed too."""
    scores = {name: float(row["score"]) for name, row in records.items() if row.get("score") is not None}
    failed = {name for name, row in records.items() if row["state"] == "failed"}
    while True:
        runs, choices = schedule(study, scores | dict.fromkeys(failed, math.nan))
        blocked = {run.name for run in runs if failed & set(run.needs)} - failed
        if not blocked:
            return runs, choices
        failed |= blocked


def _progress_line(study: Study, records: RunRecords, name: str, worker_count: int) -> str:
    """One line for a run that ended: how far the study is, how the run ended, and how long the rest may take."""
    runs, choices = _schedule(study, records)
    remaining = [run.name for run in runs if run.name not in records]
    # The final runs of an arm whose setting is not chosen yet are unknown, but their number is known.
    untuned = [arm for (_, arm), choice in choices.items() if choice.wanted]
    remaining += [path for arm in untuned for _ in study.seeds for path in (f"//{arm}", "//answers")]
    row, total = records[name], len(records) + len(remaining)
    line = f"{len(records):,}/{total:,} {name} in {format_seconds(row['seconds'])}"
    line += f" · judge {format_value(row['score'])}" if row.get("score") is not None else ""
    line += f" · failed: {row['error']}" if row["state"] == "failed" else ""
    if remaining:
        line += f" · about {format_seconds(_estimate_seconds(remaining, records) / worker_count)} left"
    return line


def _estimate_seconds(names: Iterable[str], records: RunRecords) -> float:
    """Seconds that runs may take, by the mean of the finished runs of their sort, or of all."""
    seconds_of: dict[str, list[float]] = {}
    for row in records.values():
        seconds_of.setdefault(_sort(row["name"]), []).append(row["seconds"])
    means = {sort: sum(seconds) / len(seconds) for sort, seconds in seconds_of.items()}
    overall = sum(row["seconds"] for row in records.values()) / len(records)
    return sum(means.get(_sort(name), overall) for name in names)


def _sort(name: str) -> str:
    """A sort of runs that take about as long as each other: all answers, all runs of PPO, and so on."""
    parts = name.split("/")[2:]
    if "answers" in parts:
        return "answers"
    what = parts[1] if parts[0] == "select" else parts[0]
    return PPO if what.startswith(PPO) else what


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"
