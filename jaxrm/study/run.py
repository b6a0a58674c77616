"""Run a study: a queue of runs, several at once, which can be stopped at any time and continued.

The study's folder holds

- ``study.json``: its config;
- ``queue.jsonl``: one line for each run that ended; the last line of a name counts;
- ``runs/`` and ``logs/``: the folders of the runs, and what they printed;
- ``results/``, ``report.html`` and ``mechanism.html``: see `jaxrm.study.report`.

Runs that are done are not repeated. A run that failed is tried again by the next launch.
"""

import contextlib
import dataclasses
import queue
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm.runtime import run_lock
from jaxrm.runtime.metrics import append_row, read_rows
from jaxrm.runtime.preemption import EXIT_PREEMPTED, catch_signals
from jaxrm.runtime.progress import format_seconds, format_value
from jaxrm.study import checkpoints, costs
from jaxrm.study.arms import read_arm
from jaxrm.study.collect import Progress, final_means
from jaxrm.study.config import Study
from jaxrm.study.presets import apply_preset
from jaxrm.study.record import open_folder, write_end
from jaxrm.study.report import publish
from jaxrm.study.results import Failure
from jaxrm.study.run_configs import StudyRun
from jaxrm.study.schedule import Best, Schedule, unknown_answers
from jaxrm.study.tables import AFTER_FAILURES
from jaxrm.study.worker_pool import EXIT_FAILED, Outcome, Worker, open_workers

_QUEUE = "queue.jsonl"

RunRecords = dict[str, dict[str, Any]]
"""Rows of ``queue.jsonl`` by the name of the run: ``state``, ``seconds``, and what `_record` adds."""


def run_study(config: Study) -> int:
    """Run what is left of a study, then print its tables and write its report.

    Returns:
      Exit status: 0 when all runs are done, `EXIT_FAILED` when some failed, `EXIT_PREEMPTED` when it was stopped.

    Raises:
      UserError: the folder holds another study; the message names the differences.
    """
    with run_lock.given_back():
        study = apply_preset(config)
        folder = open_folder(study)
        study = dataclasses.replace(study, run_dir=str(folder))
        records = _read_records(folder)
        schedule = Schedule(study)
        status = _run_queue(study, schedule, folder, records)
        runs = schedule.runs(_best(records))
        _publish(study, runs, folder, records)
        failed = _print_failures(study, runs, folder, records)
        if not (status or failed):
            write_end(folder, config.run_dir)
    return status or failed


def _read_records(folder: Path) -> RunRecords:
    """Records of earlier launches, without the runs that failed, so that these are tried again."""
    records = {row["name"]: row for row in read_rows(folder / _QUEUE)}
    failed = [name for name, row in records.items() if row["state"] == "failed"]
    if failed:
        print(f"{len(failed)} runs failed before and are tried again")
    return {name: row for name, row in records.items() if name not in failed}


def _publish(study: Study, runs: Sequence[StudyRun], folder: Path, records: RunRecords) -> None:
    seconds = sum(row["seconds"] for row in records.values())
    missing, blocked = _to_come(study, runs, records)
    failed = _failures(folder, records)
    publish(study, folder, Progress(_done(records), missing, _best(records), seconds, failed, blocked))


def _print_failures(study: Study, runs: Sequence[StudyRun], folder: Path, records: RunRecords) -> int:
    """Print the runs that failed; return `EXIT_FAILED`, or 0 where there are none."""
    failed = _failures(folder, records)
    for failure in failed:
        print(f"failed: {failure.name}: {failure.error} (its output: {failure.log})")
    if not failed:
        return 0
    _, blocked = _to_come(study, runs, records)
    print(f"{len(failed)} runs failed, and {len(blocked)} that need them could not start. {AFTER_FAILURES}")
    return EXIT_FAILED


def _failures(folder: Path, records: RunRecords) -> list[Failure]:
    failed = [row for row in records.values() if row["state"] == "failed"]
    return [Failure(row["name"], row["error"], str(_log(folder, row["name"]))) for row in failed]


def _run_queue(study: Study, schedule: Schedule, folder: Path, records: RunRecords) -> int:
    """Keep the workers busy until no run can start; return 0, or `EXIT_PREEMPTED` when the study was stopped."""
    outcomes: queue.Queue[Outcome] = queue.Queue()
    busy: dict[Worker, str] = {}
    with catch_signals() as stop, _open_workers(study, folder, outcomes) as workers:
        idle, runs = list(workers), schedule.runs(_best(records))
        names = [run.name for run in runs if run.name not in records]
        print(costs.in_words(study, [*names, *unknown_answers(study, _best(records))], len(workers)), flush=True)
        while True:
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
                runs = schedule.runs(_best(records))
                if not study.keep_policies:
                    checkpoints.remove_unneeded(folder, name, runs, _done(records))
                print(_progress_line(study, runs, records, name, len(workers)), flush=True)


def _open_workers(
    study: Study, folder: Path, outcomes: queue.Queue[Outcome]
) -> contextlib.AbstractContextManager[list[Worker]]:
    return open_workers(study.workers, folder, outcomes, is_trial=study.preset == "smoke")


def _best(records: RunRecords) -> dict[str, Best]:
    """The best checkpoint of every run of reinforcement learning that is done; a failed run has none."""
    return {name: Best(**row["best"]) for name, row in records.items() if "best" in row}


def _ready(runs: Iterable[StudyRun], records: RunRecords, running: Iterable[str]) -> list[StudyRun]:
    """The runs that can start now: all that they need is done."""
    started, done = {*records, *running}, _done(records)
    return [run for run in runs if run.name not in started and done.issuperset(run.needs)]


def _done(records: RunRecords) -> set[str]:
    return {name for name, row in records.items() if row["state"] == "done"}


def _to_come(study: Study, runs: Iterable[StudyRun], records: RunRecords) -> tuple[list[str], list[str]]:
    """Names of the runs that did not end: those that can start sooner or later, and those that a failed run blocks."""
    remaining, blocked = [], []
    barred = {name for name, row in records.items() if row["state"] == "failed"}
    needs: dict[str, Sequence[str]] = {run.name: run.needs for run in runs}
    needs |= unknown_answers(study, _best(records))
    for name, needed in needs.items():  # each after those that it needs
        if name in records:
            continue
        if barred.isdisjoint(needed):
            remaining.append(name)
        else:
            blocked.append(name)
            barred.add(name)
    return remaining, blocked


def _record(folder: Path, name: str, outcome: Outcome) -> dict[str, Any]:
    """The row of ``queue.jsonl`` for a run that ended: judge score and best checkpoint, where it has any."""
    row: dict[str, Any] = {
        "name": name,
        "state": "failed" if outcome.status else "done",
        "seconds": round(outcome.seconds, 1),
        "core_seconds": round(outcome.core_seconds, 1),
    }
    if outcome.status:
        return row | {"error": outcome.error}
    run = folder / "runs" / name
    score = final_means(run).get("judge")
    best = checkpoints.keep_best(run) if read_arm(name.split("/")[2]) else None
    row |= {} if score is None else {"score": score}
    return row | ({} if best is None else {"best": best._asdict()})


def _progress_line(study: Study, runs: Iterable[StudyRun], records: RunRecords, name: str, worker_count: int) -> str:
    """One line for a run that ended: how far the study is, how the run ended, and how long the rest may take."""
    remaining, _ = _to_come(study, runs, records)
    row, total = records[name], len(records) + len(remaining)
    line = f"{len(records):,}/{total:,} {name} in {format_seconds(row['seconds'])}"
    line += f" · judge {format_value(row['score'])}" if row.get("score") is not None else ""
    line += f" · failed: {row['error']}" if row["state"] == "failed" else ""
    if remaining:
        seconds = costs.seconds_of(study, remaining, _seconds(records))
        line += "" if seconds is None else f" · about {format_seconds(seconds / worker_count)} left"
    return line


def _seconds(records: RunRecords) -> Mapping[str, float]:
    return {name: row["seconds"] for name, row in records.items() if row["state"] == "done"}


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"
