"""A worker of a study: a process that executes runs, one after another.

    python -m jaxrm.study.worker [CORE]

Each input line is a run, ``{"experiment": {...}, "log": "PATH"}``. Each output line is its outcome, ``{"status": 0}``
or ``{"status": 2, "error": "..."}``, with the ``core_seconds`` that it took. What the run prints goes to its log. The
workers share a compilation cache: the study names its folder in their environment.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxrm.config.quiet import silence_libraries
from jaxrm.errors import StorageError, UserError


def main(arguments: list[str]) -> int:
    """Execute every run of the standard input."""
    if arguments and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(arguments[0])})  # before JAX makes its threads, which inherit it
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    outcomes = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print between two runs must not write among the outcomes
    for line in sys.stdin:
        started = time.process_time()
        outcome = _execute(json.loads(line))
        outcomes.write(json.dumps(outcome | {"core_seconds": time.process_time() - started}) + "\n")
        outcomes.flush()
    return 0


def _exit_with_parent(parent: int) -> None:
    """End this process when the study has ended, so that it does not work beside the next launch."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _execute(task: dict[str, Any]) -> dict[str, Any]:
    log = Path(task["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file, _output_to(file):
        try:
            return {"status": _run(task["experiment"])}
        except UserError as error:
            print(f"jaxrm: {error}")
            return {"status": 2, "error": str(error)}
        except StorageError as error:
            print(f"jaxrm: {error}")
            return {"status": 74, "error": str(error)}
        except Exception as error:  # recorded by the study, which continues with the other runs
            traceback.print_exc(file=file)
            return {"status": 1, "error": f"{type(error).__name__}: {error}"}


def _run(experiment: dict[str, Any]) -> int:
    import jax

    from jaxrm.runtime import run_lock
    from jaxrm.stage_config import read_stage
    from jaxrm.stages.table import run_stage

    silence_libraries()
    config = read_stage(experiment)
    # The worker of a study that was killed saves what it is at, and ends a moment later.
    run_lock.wait_until_free(Path(config.run_dir), seconds=60.0)
    try:
        return run_stage(config)
    finally:
        gc.collect()
        jax.clear_caches()


@contextlib.contextmanager
def _output_to(file: IO[str]) -> Iterator[None]:
    """Redirect standard output and error to a file, also where a library writes to the descriptors."""
    originals = os.dup(1), os.dup(2)
    sys.stdout.flush()
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        for number, original in enumerate(originals, 1):
            os.dup2(original, number)
            os.close(original)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
