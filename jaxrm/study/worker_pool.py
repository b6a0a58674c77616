"""The worker processes of a study, each on a core of its own; `jaxrm.study.worker` is what they execute."""

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
from jaxrm.study.run_configs import StudyRun

EXIT_FAILED = 1
_FAST_COMPILATION = "--xla_backend_optimization_level=0"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      worker: that executed it.
      status: exit status, 0 for done.
      error: one line, where the status is not 0.
      seconds: wall-clock time.
      core_seconds: of computation, over all threads.
    """

    worker: "Worker"
    status: int
    error: str
    seconds: float
    core_seconds: float = 0.0


class Worker:
    """A process that executes one run at a time. It starts with its first run, and again after it has died.

    Args:
      core: the core that it is bound to, or None.
      folder: of the study; it holds the shared compilation cache and the workers' log.
      outcomes: receives the outcome of each run.
      compiler_flags: of XLA, besides those of the environment.
    """

    def __init__(
        self, core: int | None, folder: Path, outcomes: "queue.Queue[Outcome]", compiler_flags: str = ""
    ) -> None:
        self._core, self._folder, self._outcomes = core, folder.resolve(), outcomes
        self._flags = f"{os.environ.get('XLA_FLAGS', '')} {compiler_flags}".strip()
        self._process: subprocess.Popen[str] | None = None
        self._is_stopping = False

    def start(self, run: StudyRun, log: Path) -> None:
        """Start a run whose output goes to ``log``."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._launch()
        task = json.dumps({"experiment": dicts.to_dict(run.experiment), "log": str(log)})
        threading.Thread(target=self._execute, args=(self._process, task), daemon=True).start()

    def stop(self) -> None:
        """Let the current run save its state and end the process."""
        self._is_stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stop, and wait for the end of the process."""
        self.stop()
        if self._process is not None:
            self._process.wait()

    def _launch(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "jaxrm.study.worker"]
        log = self._folder / "logs" / "workers.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as errors:
            return subprocess.Popen(
                command + ([] if self._core is None else [str(self._core)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # so that Ctrl-C reaches only the study, which passes it on
                env={
                    **os.environ,
                    "XLA_FLAGS": self._flags,
                    "JAX_COMPILATION_CACHE_DIR": str(self._folder / "compiled"),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                },
            )

    def _execute(self, process: "subprocess.Popen[str]", task: str) -> None:
        started, core_seconds = time.monotonic(), 0.0
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(task + "\n")
            process.stdin.flush()
            outcome = json.loads(process.stdout.readline())
            status, error = int(outcome["status"]), str(outcome.get("error", f"exit status {outcome['status']}"))
            core_seconds = float(outcome["core_seconds"])
        except Exception:  # no line, or none that can be read: the process is of no more use, whatever happened to it
            process.kill() if not self._is_stopping else process.terminate()
            code = process.wait()
            status = EXIT_PREEMPTED if self._is_stopping else EXIT_FAILED
            error = f"its process died with exit status {code}" + (" (out of memory?)" if code == -9 else "")
        self._outcomes.put(Outcome(self, status, error, time.monotonic() - started, core_seconds))


@contextmanager
def open_workers(
    count: int | None, folder: Path, outcomes: "queue.Queue[Outcome]", *, is_trial: bool = False
) -> Iterator[list[Worker]]:
    """Open the workers of a study, which end with the block.

    Args:
      count: of workers. None: one for each core, or one on an accelerator.
      folder: of the study.
      outcomes: receives the outcome of each run.
      is_trial: whether runs are so short that fast compilation is worth more than fast programs.
    """
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    on_accelerator = _on_accelerator()
    count = count or (1 if on_accelerator else len(available) or os.cpu_count() or 1)
    cores: Sequence[int | None] = [None] * count
    if 1 < count <= len(available) and not on_accelerator:
        cores = available[:count]
    flags = _FAST_COMPILATION if is_trial and not on_accelerator else ""
    workers = [Worker(core, folder, outcomes, flags) for core in cores]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.close()


def _on_accelerator() -> bool:
    """Whether JAX runs on an accelerator; a process of its own finds out, since JAX would take hold of the device."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() not in ("cpu", "")
