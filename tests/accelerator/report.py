"""What a check says of itself, line by line in a file, so that one that is stopped has said what it knew."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class LeftOutError(Exception):
    """The check has nothing to do here; the message says why."""


@dataclass(frozen=True)
class Row:
    """One figure of a check.

    Attributes:
      what: was measured.
      number: None where there is none.
      unit: of it.
      beside: what it is compared with, or how it came about.
      passed: whether a comparison held; None where nothing was to hold.
    """

    what: str
    number: float | None = None
    unit: str = ""
    beside: str = ""
    passed: bool | None = None


class Report:
    """Writes rows, and what is being done, to a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def doing(self, what: str) -> None:
        """What runs now, for the console."""
        self._write({"doing": what})

    def setting(self, **values: Any) -> None:
        """Devices and versions that the rows are of."""
        self._write({"setting": values})

    def row(
        self,
        what: str,
        number: float | None = None,
        unit: str = "",
        *,
        beside: str = "",
        passed: bool | None = None,
    ) -> None:
        """Add a `Row`; JSON has no NaN and no infinity."""
        if number is not None and not math.isfinite(number):
            number, beside = None, f"{number}; {beside}"
        self._write({"row": dataclasses.asdict(Row(what, number, unit, beside, passed))})

    def within(self, what: str, number: float, bound: float, note: str = "") -> None:
        """Add a row of a difference that must be at most ``bound``; NaN is not."""
        self.row(what, number, beside=f"at most {bound:g}{note}", passed=bool(number <= bound))

    def end(self, status: str, note: str = "") -> None:
        """How the check ended."""
        self._write({"status": status, "note": note})

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_report(file: Path) -> list[dict[str, Any]]:
    """The whole lines so far."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is being written
    return [json.loads(line) for line in lines]
