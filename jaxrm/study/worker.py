"""A worker of a study: a process that is given runs, one after another, and says how each ended.

    python -m jaxrm.study.worker [CORE]

A line of its input is a run, ``{"experiment": {...}, "log": "PATH"}``; the line that answers it is ``{"status": 0}``,
or ``{"status": 2, "error": "..."}``. What the run prints goes to its log. Programs are compiled once for all workers:
the study names a folder for them in the environment.
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
from pathlib import Path
from typing import IO, Any

from jaxrm.errors import UserError


def main(arguments: list[str]) -> int:
    """Answer every line of the input."""
    if arguments and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(arguments[0])})  # before the first array, which makes the threads
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints between runs is no answer
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()
    return 0


def _end_with(study: int) -> None:
    """End this process when that of the study is gone, lest it work on beside the next one."""
    while os.getppid() == study:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    log = Path(task["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file, _output_to(file):
        try:
            return {"status": _run(task["experiment"])}
        except UserError as error:
            print(f"jaxrm: {error}")
            return {"status": 2, "error": str(error)}
        except Exception as error:  # recorded by the study, which goes on with the others
            traceback.print_exc(file=file)
            return {"status": 1, "error": f"{type(error).__name__}: {error}"}


def _run(experiment: dict[str, Any]) -> int:
    import logging

    import jax

    from jaxrm.config import dicts
    from jaxrm.experiment import Experiment
    from jaxrm.stages.run import run_stage

    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return run_stage(dicts.from_config_dict(Experiment, experiment))
    finally:
        gc.collect()
        jax.clear_caches()


@contextlib.contextmanager
def _output_to(file: IO[str]) -> Any:
    """Everything that is written to the standard output and error, by libraries too, to a file."""
    kept = os.dup(1), os.dup(2)
    sys.stdout.flush()
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        for number, fd in enumerate(kept, 1):
            os.dup2(fd, number)
            os.close(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
