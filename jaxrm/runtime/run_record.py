"""The file ``run.json``: which config a run has, and its launches."""

import datetime
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.config.dicts import differences
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime import run_lock
from jaxrm.runtime.folders import next_name, what_to_type
from jaxrm.runtime.provenance import code_digest

_SHOWN = 8  # differing fields that a message lists
_HOW_LONG = ("num_steps", "num_epochs", "optimizer.", "critic.optimizer.", "data.", "seed")  # not what is trained


def is_same_launch(record: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether what is recorded was started by the very command that is given again, and has not ended.

    A job that is stopped and queued again has ``on_existing=restart`` in its command still. To begin once more would
    come to the same, since a run is a function of its config and its code, but it would never end.

    Args:
      record: with ``config``, ``launches``, and ``ended`` once it is complete.
      config: of this launch.
    """
    latest = record["launches"][-1] if record["launches"] else {}
    is_going_on = "ended" not in latest and latest.get("code") == code_digest()
    return is_going_on and not differences(record["config"], config)


def note_end(path: Path) -> None:
    """Note in ``run.json`` that the run is complete."""
    file = path / "run.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["launches"][-1]["ended"] = now()
    atomic.write_json(file, record)


def now() -> str:
    """The time in UTC, as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_record(path: Path, run_dir: str) -> dict[str, Any] | None:
    """The ``run.json`` of the run in the folder; None for a folder that is absent or empty."""
    if not path.exists():
        return None
    another = f"required an empty or a new folder, e.g. {flag('run_dir')}={next_name(run_dir)}"
    if not path.is_dir():
        raise UserError(f"{option('run_dir')} is {run_dir!r}, which is a file; {another}")
    names = sorted(entry.name for entry in path.iterdir() if not run_lock.is_no_content(entry.name))
    if not names:
        return None
    if "run.json" not in names:
        raise UserError(f"{option('run_dir')} is {run_dir!r}, which is no run but holds {names[0]!r}; {another}")
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return {"config": dict(record["config"]), "launches": [{**launch} for launch in record["launches"]] or [{}]}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path / 'run.json'} cannot be read ({error}); {another}") from error


def check_same_config(
    changed: list[tuple[str, Any, Any]], may_differ: frozenset[str], run_dir: str, algorithm: str
) -> None:
    """Refuse to continue a run whose config differs in more than ``may_differ``.

    Raises:
      UserError: naming the fields, and what to type.
    """
    wrong = [
        (name, old, new)
        for name, old, new in changed
        if not any(fnmatchcase(name, free) or fnmatchcase(name, f"{free}.*") for free in may_differ)
    ]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        listed = ", ".join(f"{option(name)} was {old!r} and is {new!r}" for name, old, new in wrong[:_SHOWN])
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which holds a run of another config: {listed}{more}; "
            f"{what_to_type(run_dir, ('restart',))}"
            f"{_train_on(run_dir, algorithm) if all(name.startswith(_HOW_LONG) for name, _, _ in wrong) else ''}"
        )


def _train_on(run_dir: str, algorithm: str) -> str:
    """How to train on with what a run has learned, where its stage can begin with that."""
    reference = {
        "dpo": ", which becomes its reference too",
        "ppo": ", which becomes its reference too",
        "sft": "",
        "seq2seq_rm": "",
    }
    if algorithm not in reference:
        return ""
    return (
        f"; to train on with what it has learned{reference[algorithm]}, use {flag('model.path')}={run_dir} "
        f"{flag('run_dir')}={next_name(run_dir)}"
    )
