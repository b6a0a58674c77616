"""The record of a study, ``study.json``: which folder holds which study, and who may continue it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.config import dicts
from jaxrm.config.recorded import upgraded
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime import run_lock
from jaxrm.runtime.folders import check_writable, checked_path, rename_aside, unusable, what_to_type
from jaxrm.runtime.provenance import code_digest
from jaxrm.runtime.run_record import is_same_launch, now
from jaxrm.study.config import Study

_RECORD = "study.json"
# What may change between launches: which runs there are, how many at once and how they are read, but not what a run is.
_MAY_DIFFER = (
    "run_dir",
    "on_existing",
    "preset",
    "worlds",
    "arms",
    "biases",
    "seeds",
    "kl_coefs",
    "learning_rates",
    "dpo_betas",
    "blind_kl",
    "mechanism",
    "keep_policies",
    "workers",
)


def open_folder(config: Study) -> Path:
    """Make the folder of a study, lock it and write its record.

    Args:
      config: as it was given.

    Raises:
      UserError: the folder holds something else, or another study; the message names the differences.
    """
    path, run_dir = checked_path(config.run_dir), config.run_dir
    check_writable(path, run_dir)
    run_lock.check_free(path, run_dir)
    resolved = dicts.to_dict(config)
    entries = [entry.name for entry in path.iterdir()] if path.exists() else []
    names = sorted(name for name in entries if not run_lock.is_no_content(name))
    if names and _RECORD not in names and config.on_existing != "restart":
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which is no study but holds {names[0]!r}; required an empty or a new "
            f"folder, e.g. {flag('run_dir')}={run_dir.rstrip('/')}-2"
        )
    if names and config.on_existing == "error":
        raise UserError(f"{run_dir} holds a study; {what_to_type(run_dir, ('resume', 'restart'))}")
    restarts = bool(names) and config.on_existing == "restart" and not _is_same_launch(path, resolved)
    if names and not restarts:
        _check_same_study(path / _RECORD, run_dir, resolved)
        print(f"{run_dir} holds this study; continuing it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        run_lock.take(path, run_dir)
        if restarts:
            run_lock.give_back(path)
            print(f"{run_dir} is new; what was there is now {rename_aside(path)}")
            path.mkdir()
            run_lock.take(path, run_dir)
        atomic.remove_unfinished(path)
        _write_record(path, {"config": resolved, "code": code_digest()})
    except OSError as error:
        raise unusable(run_dir, str(error.strerror)) from error
    return path


def write_end(folder: Path, run_dir: str) -> None:
    """Note that all runs are done, so that the next restart is a new one."""
    _write_record(folder, {**_read_record(folder / _RECORD, run_dir), "ended": now()})


def _is_same_launch(path: Path, resolved: Mapping[str, Any]) -> bool:
    """Whether this very command began the study and was stopped (`jaxrm.runtime.run_record.is_same_launch`)."""
    try:
        record = _read_record(path / _RECORD, str(path))
    except UserError:
        return False
    return is_same_launch({"config": record["config"], "launches": [record]}, resolved)


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    atomic.write_json(path / _RECORD, record)


def _read_record(path: Path, run_dir: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "config": dict(record["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {what_to_type(run_dir, ('restart',))}") from error


def _check_same_study(record: Path, run_dir: str, resolved: Mapping[str, Any]) -> None:
    """Refuse to continue a study whose config differs in more than which runs there are."""
    previous = _read_record(record, run_dir)["config"]
    if "selection_seeds" in previous:
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which holds a study that chose its settings by the judge beforehand; "
            f"its report.html stays, but it cannot be continued; {what_to_type(run_dir, ('restart',))}"
        )
    changes = [
        f"{option(name)} was {old!r} and is {new!r}"
        for name, old, new in dicts.differences(upgraded(previous, resolved), resolved)
        if name.split(".")[0] not in _MAY_DIFFER
    ]
    if changes:
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which holds another study: {', '.join(changes[:3])}{more}; "
            f"{what_to_type(run_dir, ('restart',))}"
        )
