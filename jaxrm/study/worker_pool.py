"""Processes that run the runs of a study, each on a core of its own; in one runs `jaxrm.study.worker`."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxrm.config import dicts
from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.study.schedule import Run

EXIT_FAILED = 1


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit status, what was wrong, and seconds."""

    worker: "Worker"
    status: int
    error: str
    seconds: float


class Worker:
    """A process that runs one run at a time, started with its first one, and anew when it has died.

    Args:
      core: that it keeps to, or None.
      folder: of the study: compiled programs, which all workers share, and what a worker says outside of runs.
      ended: where it tells of runs that ended.
    """

    def __init__(self, core: int | None, folder: Path, ended: "queue.Queue[Ended]") -> None:
        self._core, self._folder, self._ended = core, folder.resolve(), ended
        self._process: subprocess.Popen[str] | None = None
        self._asked_to_stop = False

    def start(self, run: Run, log: Path) -> None:
        """Hand it a run, whose output goes to ``log``."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._launch()
        task = json.dumps({"experiment": dicts.as_dict(run.experiment), "log": str(log)})
        threading.Thread(target=self._wait, args=(self._process, task), daemon=True).start()

    def stop(self) -> None:
        """Ask it to save what it is doing and to go."""
        self._asked_to_stop = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End it; what it is doing is saved first."""
        self.stop()
        if self._process is not None:
            self._process.wait()

    def _launch(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "jaxrm.study.worker"]
        says = self._folder / "logs" / "workers.log"
        says.parent.mkdir(parents=True, exist_ok=True)
        with says.open("a", encoding="utf-8") as errors:
            return subprocess.Popen(
                command + ([] if self._core is None else [str(self._core)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # so that Ctrl-C reaches the study alone, which passes it on
                env={
                    **os.environ,
                    "JAX_COMPILATION_CACHE_DIR": str(self._folder / "compiled"),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                },
            )

    def _wait(self, process: "subprocess.Popen[str]", task: str) -> None:
        started = time.monotonic()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(task + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            status, error = int(answer["status"]), str(answer.get("error", f"exit status {answer['status']}"))
        except Exception:  # there is no answer, or none that can be read: whatever came of the process, it is no use
            process.kill() if not self._asked_to_stop else process.terminate()
            code = process.wait()
            status = EXIT_PREEMPTED if self._asked_to_stop else EXIT_FAILED
            error = f"its process died with exit status {code}" + (" (out of memory?)" if code == -9 else "")
        self._ended.put(Ended(self, status, error, time.monotonic() - started))


@contextmanager
def workers(count: int | None, folder: Path, ended: "queue.Queue[Ended]") -> Iterator[list[Worker]]:
    """The workers of a study; they end with the block.

    Args:
      count: how many. None: one for each core, or one on an accelerator.
      folder: of the study.
      ended: where they tell of runs that ended.
    """
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    on_accelerator = _on_accelerator()
    count = count or (1 if on_accelerator else len(available) or os.cpu_count() or 1)
    cores: Sequence[int | None] = [None] * count
    if 1 < count <= len(available) and not on_accelerator:
        cores = available[:count]
    made = [Worker(core, folder, ended) for core in cores]
    try:
        yield made
    finally:
        for worker in made:
            worker.stop()
        for worker in made:
            worker.close()


def _on_accelerator() -> bool:
    """Whether jax runs on one; asked in a process of its own, since asking takes hold of it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() not in ("cpu", "")
