"""Results of the checks, as a table in Markdown and as JSON."""

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerator.checks import Check
from accelerator.report import Row

from jaxrm.runtime.provenance import git_state

BAD = ("failed", "timed out")


@dataclass(frozen=True)
class Result:
    """How a check went.

    Attributes:
      check: its name.
      status: ``done``, ``left out``, ``failed`` or ``timed out``.
      note: why, where it is not done.
      seconds: that its process took.
      decides: whether the exit status depends on it.
      rows: its figures, also those before it was stopped.
      setting: devices and versions; empty where it did not come so far.
    """

    check: str
    status: str
    note: str
    seconds: float
    decides: bool
    rows: list[Row]
    setting: dict[str, Any]

    @classmethod
    def of(
        cls, check: Check, lines: list[dict[str, Any]], log: Path, seconds: float, exit_status: int, late: str
    ) -> "Result":
        """The result of a process that wrote ``lines`` and ``log``; ``late`` says how it was stopped, if it was."""
        rows = [Row(**line["row"]) for line in lines if "row" in line]
        setting = next((line["setting"] for line in lines if "setting" in line), {})
        ends = [line for line in lines if "status" in line]
        if ends:
            status, note = ends[-1]["status"], ends[-1]["note"]
        elif late:
            status, note = "timed out", late
        else:  # killed, or it could not begin
            last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            status, note = "failed", f"exit status {exit_status}; {last[0][:200] if last else 'no output'}"
        if status == "done" and any(row.passed is False for row in rows):
            status = "failed"
        return cls(check.name, status, note, seconds, check.decides, rows, setting)

    @property
    def passed(self) -> bool:
        """Whether nothing went wrong; a check that was left out for a reason passed."""
        return self.status not in BAD

    @property
    def line(self) -> str:
        """For the console."""
        figures = "; ".join(f"{row.what} {_figure(row)}" for row in self.rows if row.number is not None)
        return f"{self.check}: {self.status}{f' ({self.note})' if self.note else ''} {figures}"[:240]


def describe_run(command: str, shape: str, root: Path) -> dict[str, Any]:
    """What all checks have in common, without JAX, which one process alone may open on a TPU."""
    return {
        "command": command,
        "shape": shape,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def write(out: Path, setting: dict[str, Any], results: list[Result]) -> None:
    """Write ``table.md`` and ``results.json``."""
    (out / "table.md").write_text(markdown(setting, results), encoding="utf-8")
    figures = setting | {"devices": _devices(results), "checks": [asdict(result) for result in results]}
    (out / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


def markdown(setting: dict[str, Any], results: list[Result]) -> str:
    """The table, with what it is of in a line above it."""
    devices, git = _devices(results), setting["git"]
    versions = devices.get("versions", {})
    memory = f", {devices['memory_gib']:.1f} GiB each" if devices.get("memory_gib") else ""
    kind = f"{devices['count']} × {devices['kind']}{memory}" if devices else "no device was opened"
    commit = "no commit" if git is None else git["commit"][:12] + (" and changes" if git["dirty"] else "")
    lines = [
        f"{kind}; JAX {versions.get('jax', '?')}; {setting['host']}; {commit}; {setting['date'][:10]}; "
        f"`{setting['command']}`",
        "",
        "| check | what | figure | beside |",
        "|---|---|---|---|",
    ]
    for result in results:
        name = f"`{result.check}`, {result.seconds:.0f} s"
        if result.status != "done" and (result.note or not result.rows):
            lines.append(_line(name, "", f"**{result.status}**", result.note))
            name = ""
        for row in result.rows:
            verdict = {None: "", True: ": passed", False: ": **failed**"}[row.passed]
            lines.append(_line(name, row.what, _figure(row), row.beside + verdict))
            name = ""
    return "\n".join(lines) + "\n"


def _devices(results: list[Result]) -> dict[str, Any]:
    return next((result.setting for result in results if result.setting), {})


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _figure(row: Row) -> str:
    if row.number is None:
        return "–"
    size = abs(row.number)
    text = f"{row.number:,.0f}" if size >= 1000 else f"{row.number:.3g}"
    return f"{text} {row.unit}".strip()
