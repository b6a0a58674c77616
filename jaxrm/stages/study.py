"""Running a study: a queue of runs that survives being stopped, several at once, and what they come to.

In ``run_dir`` are ``study.json``, its config; ``queue.jsonl``, one line for each run that ended (the last one of a name
counts); ``runs/``, the folders of the runs, and ``logs/``, what they printed; ``results/``, see
`jaxrm.stages.study_collect`; and ``report.html``. What is done is not run again; a run that failed is tried again by
the next launch.
"""

import dataclasses
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrm import study as studies
from jaxrm.errors import UserError
from jaxrm.runtime import config as bridge
from jaxrm.runtime.metrics import append_row, read_rows
from jaxrm.runtime.preemption import EXIT_PREEMPTED, catch_signals
from jaxrm.runtime.progress import format_seconds, format_value
from jaxrm.runtime.run_folder import check_writable, checked_path, rename_aside, what_to_type, write_json_atomically
from jaxrm.stages import study_collect, study_report
from jaxrm.study import PPO, Run, Study

_RECORD, _QUEUE = "study.json", "queue.jsonl"
# What may change between launches: which runs there are, and how many at once, but not what any of them is.
_MAY_DIFFER = ("run_dir", "on_existing", "worlds", "arms", "seeds", "selection_seeds", "workers", "extensions")
EXIT_FAILED = 1


def run(config: Study) -> int:
    """Run what is left of a study, and say what came of it.

    Returns:
      Exit status: 0 when all runs are done, `EXIT_FAILED` when some failed, `EXIT_PREEMPTED` when it was asked to stop.

    Raises:
      UserError: for a folder that holds another study, and says in what.
    """
    folder = _open(config)
    study = studies.shrunk(dataclasses.replace(config, run_dir=str(folder)))
    records = {row["name"]: row for row in read_rows(folder / _QUEUE)}
    failed_before = [name for name, row in records.items() if row["state"] == "failed"]
    for name in failed_before:
        del records[name]
    if failed_before:
        print(f"{len(failed_before)} runs failed before and are tried again")
    status = _work(study, folder, records)
    runs, choices = studies.plan(study, _scores(records))
    study_collect.collect(study, folder, [run for run in runs if _state(records, run) == "done"], choices)
    about = [("Folder", str(folder)), ("Worlds", ", ".join(study.worlds)), ("Policy", f"{study.size}")]
    about += [("Seeds", f"{len(study.seeds)}, settings chosen with {len(study.selection_seeds)} other")]
    about += [("Time of all runs", format_seconds(sum(row["seconds"] for row in records.values())))]
    expected = [(world, arm, seed) for world in study.worlds for arm in study.arms for seed in study.seeds]
    study_report.close(folder, about=about, expected=expected)
    failed = [row for row in records.values() if row["state"] == "failed"]
    for row in failed:
        print(f"failed: {row['name']}: {row['error']} (what it printed: {_log(folder, row['name'])})")
    if failed:
        skipped = [run.name for run in runs if run.name not in records]
        print(f"{len(failed)} runs failed, {len(skipped)} could not start for it; the same command tries them again")
    return status or (EXIT_FAILED if failed else 0)


def _open(config: Study) -> Path:
    """The folder of the study, with its record; refuses that of another study."""
    path = checked_path(config.run_dir)
    check_writable(path, config.run_dir)
    resolved = bridge.as_dict(config)
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if names and _RECORD not in names and config.on_existing != "restart":
        raise UserError(
            f"config.run_dir is {config.run_dir!r}, which is no study but holds {names[0]!r}; required an empty or a "
            f"new folder, e.g. --config.run_dir={config.run_dir.rstrip('/')}-2"
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
            f"config.{name} was {old!r} and is {new!r}"
            for name, old, new in bridge.differences(found, resolved)
            if name.split(".")[0] not in _MAY_DIFFER
        ]
        if changed:
            more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"config.run_dir is {config.run_dir!r}, which holds another study: {', '.join(changed[:3])}{more}; "
                f"{what_to_type(config.run_dir, ('restart',))}"
            )
        print(f"{config.run_dir} holds this study; continuing it")
    path.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path / _RECORD, {"config": resolved})
    return path


def _work(study: Study, folder: Path, records: dict[str, dict[str, Any]]) -> int:
    """Keep the workers busy until nothing is left that can start; 0, or `EXIT_PREEMPTED`."""
    busy: dict[_Worker, str] = {}
    with catch_signals() as stop, _workers(study, folder) as workers:
        idle = list(workers)
        while True:
            runs, choices = studies.plan(study, _scores(records))
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
                return EXIT_PREEMPTED if stop.requested and waiting else 0
            ended = _next(workers, stop)
            name = busy.pop(ended.worker)
            idle.append(ended.worker)
            if ended.status == EXIT_PREEMPTED:
                continue
            row = {"name": name, "state": "failed" if ended.status else "done", "seconds": round(ended.seconds, 1)}
            if ended.status:
                row["error"] = ended.error
            else:
                score = study_collect.score_of(folder / "runs" / name)
                row |= {} if score is None else {"score": score}
            append_row(folder / _QUEUE, row)
            records[name] = row
            print(_line(study, row, runs, choices, records, len(workers)), flush=True)


def _line(
    study: Study,
    row: Mapping[str, Any],
    runs: Sequence[Run],
    choices: Mapping[tuple[str, str], studies.Choice],
    records: Mapping[str, Mapping[str, Any]],
    workers: int,
) -> str:
    """One line for a run that ended: how far the study is, what it was, and how long the rest may take."""
    # Of arms whose settings are not chosen yet the final runs are unknown, but not how many there will be.
    open_arms = [arm for (_, arm), choice in choices.items() if choice.chosen is None]
    left = [run.name for run in runs if run.name not in records]
    left += [name for arm in open_arms for _ in study.seeds for name in (f"//{arm}", "//answers")]
    spent: dict[str, list[float]] = {}
    for each in records.values():
        spent.setdefault(_sort(each["name"]), []).append(each["seconds"])
    every = [seconds for of_sort in spent.values() for seconds in of_sort]
    known = {sort: sum(seconds) / len(seconds) for sort, seconds in spent.items()}
    rest = sum(known.get(_sort(name), sum(every) / len(every)) for name in left) / workers
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


def _scores(records: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {
        name: math.nan if row["state"] == "failed" else float(row["score"])
        for name, row in records.items()
        if row["state"] == "failed" or row.get("score") is not None
    }


def _state(records: Mapping[str, Mapping[str, Any]], run: Run) -> str:
    return str(records.get(run.name, {}).get("state", "waiting"))


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


# --- workers


@dataclasses.dataclass(frozen=True)
class _Ended:
    worker: "_Worker"
    status: int
    error: str
    seconds: float


class _Worker:
    """A process that runs one run at a time (`jaxrm.stages.study_worker`), and is replaced when it dies."""

    def __init__(self, core: int | None, cache: Path, ended: "queue.Queue[_Ended]") -> None:
        self._core, self._cache, self._ended = core, cache, ended
        self._process: subprocess.Popen[str] | None = None

    def start(self, run: Run, log: Path) -> None:
        """Hand it a run; how that ends is put into the queue."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "jaxrm.stages.study_worker"]
            self._process = subprocess.Popen(
                command + ([] if self._core is None else [str(self._core)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={
                    **os.environ,
                    "JAX_COMPILATION_CACHE_DIR": str(self._cache),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                },
            )
        task = json.dumps({"experiment": bridge.as_dict(run.experiment), "log": str(log)})
        threading.Thread(target=self._wait, args=(task,), daemon=True).start()

    def terminate(self) -> None:
        """Ask it to save what it is doing and to go."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End it; it has nothing to do."""
        if self._process is not None:
            self.terminate()
            self._process.communicate()

    def _wait(self, task: str) -> None:
        process, started = self._process, time.monotonic()
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(task + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):
            line = ""
        if line:
            answer = json.loads(line)
            status, error = int(answer["status"]), str(answer.get("error", f"exit status {answer['status']}"))
        else:
            code = process.wait()
            asked = code == -signal.SIGTERM
            status = EXIT_PREEMPTED if asked else EXIT_FAILED
            error = f"its process died with exit status {code}" + (" (out of memory?)" if code == -9 else "")
        self._ended.put(_Ended(self, status, error, time.monotonic() - started))


@contextmanager
def _workers(study: Study, folder: Path) -> Iterator[list[_Worker]]:
    """The workers, not started yet, each on a core of its own where there are several."""
    count = study.workers or (1 if _on_accelerator() else len(_cores()))
    cores: Sequence[int | None] = [None] * count
    if count > 1 and not _on_accelerator():
        cores = [_cores()[i % len(_cores())] for i in range(count)]
    ended: queue.Queue[_Ended] = queue.Queue()
    workers = [_Worker(core, (folder / "compiled").resolve(), ended) for core in cores]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _next(workers: Sequence[_Worker], stop: Any) -> _Ended:
    """The next run that ends; workers are asked to stop once that is wanted."""
    told = False
    while True:
        if stop.requested and not told:
            told = True
            for worker in workers:
                worker.terminate()
        try:
            return workers[0]._ended.get(timeout=0.5)
        except queue.Empty:
            continue


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _on_accelerator() -> bool:
    """Whether jax runs on one; asked in a process of its own, since asking takes hold of it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() not in ("cpu", "")
