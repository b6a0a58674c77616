"""What a run measures: rows in ``metrics.jsonl``, and the same numbers in TensorBoard and W&B.

A row is one JSON object a line, ``{"step": 20, "loss": 2.31, …, "time": 1754000000.0}``. The fields of ``WALL_CLOCK``
depend on the machine and the moment; all others are a function of config, data and seed, so that a run that was
interrupted and continued leaves the same rows as one that was not.
"""

import importlib.util
import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxrm import atomic
from jaxrm.config.fields import at_least, bounded, check, place, typed
from jaxrm.errors import UserError
from jaxrm.runtime.run_folder import RunFolder

PHASES = ("rollout", "log_probs", "scoring", "update")
"""Phases of a PPO step, each with its time and speed in the row."""
JUDGE_COST = (
    "questions",
    "cached",
    "calls",
    "retries",
    "malformed",
    "unusable",
    "prompt_tokens",
    "completion_tokens",
    "unmetered",
    "seconds",
)
"""What a judge behind an endpoint cost since the run began, see `jaxrm.inference.chat_endpoint.EndpointCost`.

A row has it as ``judge_calls`` and so on, or as ``judge_calls/NAME`` of a source with a name. A launch that is killed
loses the count since its last row, but not the answers.
"""
_FLUSH_SECONDS = 30.0
WALL_CLOCK = frozenset(
    {"time", "step_seconds", "tokens_per_second", "mfu", "host_memory_gib", "device_memory_gib"}
    | {f"{phase}_{unit}" for phase in PHASES for unit in ("seconds", "tokens_per_second")}
    | {f"judge_{name}" for name in JUDGE_COST}
)
"""Fields of a row that differ between two runs of the same config, see `is_wall_clock`."""


def is_wall_clock(field: str) -> bool:
    """Whether a field of a row differs between two runs of the same config, that of a named source too."""
    return field.partition("/")[0] in WALL_CLOCK


@dataclass(frozen=True)
class LoggingConfig:
    """What is written how often.

    Attributes:
      every: steps between two rows; the last step always has one.
      progress: show a progress bar, or lines where the output is no terminal.
      tensorboard: write TensorBoard's event files.
      wandb_project: project of Weights & Biases that the run is sent to; None sends nothing.
    """

    every: int = bounded(10, at_least(1))
    progress: bool = True
    tensorboard: bool = True
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise UserError(
                f"{place(self, 'wandb_project')} is {self.wandb_project!r}, but wandb is not installed; "
                f"use pip install wandb, or {typed(self, 'wandb_project', None)}"
            )


class TensorBoardWriter:
    """Writes TensorBoard's event file, in the thread that calls it.

    tensorboardX's own ``SummaryWriter`` has a thread and a queue: when the disk is full the thread ends, and training
    waits for ever for room in the queue.

    Args:
      folder: of the event files; a new one is made.
      purge_step: rows of earlier files from this step on are hidden; None hides none.
    """

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar, self._next_flush = Event, summary.scalar, 0.0
        self._events = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=purge_step, session_log=start, wall_time=time.time()))

    def write(self, step: int, row: Mapping[str, float], now: float) -> None:
        """Write one row, of the time ``now`` in seconds."""
        for name, value in row.items():
            self._events.write_event(self._event(summary=self._scalar(name, value), step=step, wall_time=now))
        if now >= self._next_flush:
            self._events.flush()
            self._next_flush = now + _FLUSH_SECONDS

    def close(self) -> None:
        """Finish the file."""
        self._events.close()


class MetricsWriter:
    """Writes rows of plain floats; ``open_metrics`` makes one."""

    def __init__(self, file: Any, tensorboard: Any, wandb_run: Any) -> None:
        self._file, self._tensorboard, self._wandb_run = file, tensorboard, wandb_run

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row; it is in the file when this returns, so write a step's row before its checkpoint.

        Args:
          step: how many optimizer steps have been done.
          metrics: plain numbers by name, such as ``loss`` or ``eval/loss``; None leaves a field out.
        """
        row = {name: value for name, value in metrics.items() if value is not None}
        assert "step" not in row and "time" not in row, "the writer sets these"
        now = time.time()
        if self._file is not None:
            self._file.write(json_line({"step": step, **row, "time": round(now, 3)}))
            self._file.flush()
        if self._tensorboard is not None:
            self._tensorboard.write(step, row, now)
        if self._wandb_run is not None:
            self._wandb_run.log(row, step=step)

    def close(self) -> None:
        """Finish the files."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_metrics(
    folder: RunFolder, config: LoggingConfig, *, after_step: int | None, run_config: Mapping[str, Any] | None = None
) -> MetricsWriter:
    """Open the run's metrics to be continued after a step.

    Args:
      folder: the run; only its writer writes.
      config: what is written.
      after_step: the step of the state that training starts from: rows of later steps, which an interrupted
          run leaves behind, are removed. None for a fresh start, which removes all.
      run_config: what W&B shows as the run's config.
    """
    if not folder.is_writer:
        return MetricsWriter(None, None, None)
    keep = -1 if after_step is None else after_step
    remove_rows_after(folder.metrics, keep)
    tensorboard = None
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is not None:
        # TensorBoard forgets the removed rows too
        tensorboard = TensorBoardWriter(folder.tensorboard, purge_step=keep + 1 if folder.resumed else None)
    wandb_run = None
    if config.wandb_project is not None:
        import wandb

        wandb_run = wandb.init(
            project=config.wandb_project,
            id=_wandb_id(folder.path),
            resume="allow",
            dir=str(folder.path),
            config=None if run_config is None else dict(run_config),
        )
    return MetricsWriter(folder.metrics.open("a", encoding="utf-8"), tensorboard, wandb_run)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file; a last line that a kill cut short is left out.

    Raises:
      UserError: a line before the last is no JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut short
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is {line[:60]!r}; required one JSON object a line; remove the line")
        rows.append(row)
    return rows


def remove_rows_after(path: Path, step: int) -> None:
    """Remove rows of later steps, and a last line that was cut short, from a JSONL file, all at once.

    Rows that stay are not rewritten: their text is what it was.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    remaining = [line for line, row in zip(lines, read_rows(path), strict=True) if row.get("step", -1) <= step]
    atomic.write_text(path, "".join(f"{line}\n" for line in remaining))


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of valid JSON, newline included.

    JSON has no NaN or infinity: they are written as the strings ``nan``, ``inf`` and ``-inf``, which ``float`` reads.
    """
    plain = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
    return json.dumps(plain, allow_nan=False, ensure_ascii=False) + "\n"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row, such as a generated sample, to a JSONL file, see `append_lines`."""
    append_lines(path, json_line(row))


def append_lines(path: Path, lines: str) -> None:
    """Append whole lines to a file that one process writes; they are on disk when this returns.

    A last line without its newline, which a kill or a full disk leaves, is cut off first.

    Args:
      path: the file; its folders are made.
      lines: each with its newline.

    Raises:
      OSError: they could not be written whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if size and file.read(1) != b"\n":
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(lines.encode())  # the whole of it, in as many writes as that takes
        file.flush()
        os.fsync(file.fileno())


def _wandb_id(folder: Path) -> str:
    """The id under which W&B continues the run, stored in the folder."""
    path = folder / "wandb.json"
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    run_id = secrets.token_hex(8)
    atomic.write_json(path, {"id": run_id})
    return run_id
