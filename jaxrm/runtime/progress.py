"""What a person sees while a run works: how far it is, how fast, how long it takes yet, and tables at the end.

In a terminal a bar; elsewhere (a log file, a notebook's ``!command``) a plain line every few seconds. Progress goes to
stderr, tables go to stdout.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TextIO


class Progress:
    """Shows the progress of one phase, such as training or tokenizing.

        with Progress("train", total=1000, unit="steps", done=resumed_at) as progress:
            for step in range(resumed_at, 1000):
                ...
                progress.update(step + 1, loss=2.31, tokens_per_second=1200.0)

    The time left is reckoned from the first ``update`` on, since what comes before it is mostly compilation.

    Args:
      label: the phase, in a word or two.
      total: how many units the whole phase has; None where it is not known.
      unit: what is counted, in the plural.
      done: how many of them were done before, in an interrupted run.
      enabled: False shows nothing, as in all processes but the first.
      seconds: time between two plain lines.
      stream: where to write, stderr by default.
      clock: seconds that never go back.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        unit: str = "steps",
        done: int = 0,
        enabled: bool = True,
        seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._total, self._unit, self._done = label, total, unit, done
        self._enabled, self._seconds, self._clock = enabled, seconds, clock
        self._stream = sys.stderr if stream is None else stream
        self._first: tuple[float, int] | None = None  # when the first update came, and what was done then
        self._shown: dict[str, float | str] = {}
        self._last_line: tuple[float, int] | None = None
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._enabled and self._stream.isatty():
            self._bar = _bar(self._stream)
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, shown="")
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last_line is not None and self._last_line[1] != self._done:
            self._print_line()

    def update(self, done: int, **shown: float | str | None) -> None:
        """Say how many units are done, and what to show beside it.

        Args:
          done: units done so far, from the start of the whole phase.
          **shown: numbers or words by name; they stay until they are given anew, and None takes one away.
        """
        if not self._enabled:
            return
        now = self._clock()
        self._done = done
        self._first = self._first or (now, done)
        self._shown = {name: x for name, x in {**self._shown, **shown}.items() if x is not None}
        if self._bar is not None:
            self._bar.update(self._task, completed=done, shown=_shown(self._shown) + self._time_left())
        elif self._last_line is None or now - self._last_line[0] >= self._seconds or done == self._total:
            self._print_line()

    def print(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def seconds_left(self) -> float | None:
        """Return the time that the rest will take at the speed so far; None where it cannot be told yet."""
        if self._total is None or self._first is None or self._done <= self._first[1]:
            return None
        elapsed = self._clock() - self._first[0]
        return elapsed / (self._done - self._first[1]) * max(self._total - self._done, 0)

    def _time_left(self) -> str:
        left = self.seconds_left()
        return "" if left is None or self._done == self._total else f" · {format_seconds(left)} left"

    def _print_line(self) -> None:
        self._last_line = (self._clock(), self._done)
        total = "" if self._total is None else f"/{self._total:,}"
        line = f"{self._label} {self._done:,}{total} {self._unit}{_shown(self._shown)}{self._time_left()}"
        print(line, file=self._stream, flush=True)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], stream: TextIO | None = None
) -> None:
    """Print a table, numbers to the right and words to the left.

    Args:
      title: stands above it.
      columns: the names of the columns.
      rows: one sequence a row, as long as ``columns``; numbers are formatted by ``format_value``.
      stream: where to write, stdout by default.
    """
    rows = [list(row) for row in rows]
    assert all(len(row) == len(columns) for row in rows), "a row is as long as the columns"
    cells = [list(columns), *([format_value(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [bool(rows) and not any(isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
             for row in cells]  # fmt: skip
    rule = "  ".join("─" * width for width in widths)
    text = "\n".join(line.rstrip() for line in [title, lines[0], rule, *lines[1:]])
    print(f"\n{text}\n", file=sys.stdout if stream is None else stream, flush=True)


def format_value(value: Any) -> str:
    """Format a number as a person reads it: ``12,345``, ``2.31``, ``3e-06``; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def format_seconds(seconds: float) -> str:
    """Format a duration: ``45 s``, ``12:05``, ``3:07:09``, ``2 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _shown(values: dict[str, float | str]) -> str:
    parts = [f"{_spoken(name)} {format_value(value)}" for name, value in values.items()]
    return "".join(f" · {part}" for part in parts)


def _spoken(name: str) -> str:
    return name.replace("_per_second", "/s").replace("_", " ")


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
        console=Console(file=stream),
        refresh_per_second=4,
    )
