"""The folder of a run: what it holds, when it may be continued, and how it says where it came from.

    run_dir/
      run.json        resolved config; one entry per launch: time, command, versions, devices, git commit
      metrics.jsonl   one row per logged step (``metrics``)
      samples.jsonl   generated samples
      checkpoints/    whole states
      model.json      shape of the model
      tokenizer/      the tokenizer that it was trained with
      tensorboard/    the metrics again

Nothing is ever deleted: a run that is started anew finds its old folder beside the new one, as ``run_dir.1``.
"""

import datetime
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxrm import atomic
from jaxrm.config.dicts import differences
from jaxrm.config.recorded import upgraded
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime.provenance import describe_devices, git_state, package_versions

OnExisting = Literal["resume", "restart", "error"]
_SHOWN = 8  # differing fields that a message lists


@dataclass(frozen=True)
class RunFolder:
    """An opened run.

    Attributes:
      path: the folder.
      resumed: whether the folder had this run before.
      message: what was in the folder, for the console.
      is_writer: whether this process writes into it.
    """

    path: Path
    resumed: bool
    message: str
    is_writer: bool = True

    @property
    def checkpoints(self) -> Path:
        """Folder of the whole states."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        """File of one row per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """File with the shape of the model."""
        return self.path / "model.json"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer that the run was trained with."""
        return self.path / "tokenizer"

    @property
    def samples(self) -> Path:
        """File of generated samples."""
        return self.path / "samples.jsonl"


def open_run(
    run_dir: str,
    resolved_config: Mapping[str, Any],
    *,
    on_existing: OnExisting = "resume",
    may_differ: frozenset[str] = frozenset(),
    is_writer: bool = True,
    process_count: int = 1,
    command: list[str] | None = None,
    devices: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Make the folder of a run, or find the run that it holds, and note this launch in ``run.json``.

    Where several processes take part, all call this; the writer decides and the others learn what it decided.

    Args:
      run_dir: the folder; its parents are made.
      resolved_config: the config as ``jaxrm.config.dicts.to_dict`` gives it.
      on_existing: what to do with a folder that holds a run: "resume" continues it if the configs agree,
          "restart" renames it aside to ``run_dir.1``, "error" refuses.
      may_differ: dotted names (without ``config.``) of fields and sections that may change between launches,
          such as ``mesh``, since a checkpoint restores on another one.
      is_writer: whether this process writes; exactly one does.
      process_count: the number of processes that call this.
      command: the command line, ``sys.argv`` by default.
      devices: what ``run.json`` says of the devices; those of JAX by default.

    Raises:
      UserError: the folder belongs to another config, holds something that is no run, or cannot be written.
          Nothing has been written then.
    """
    opened: RunFolder | UserError | None = None
    if is_writer:
        try:
            opened = _open(run_dir, resolved_config, on_existing, may_differ, command, devices)
        except UserError as error:
            opened = error
    outcome = -1 if isinstance(opened, UserError) else int(opened is not None and opened.resumed)
    if process_count > 1:
        outcome = from_writer(outcome, is_writer)
    if isinstance(opened, UserError):
        raise opened
    if outcome < 0:
        raise UserError(f"{option('run_dir')} is {run_dir!r}, which the first process refused; its message says why")
    return opened or RunFolder(Path(run_dir).expanduser(), bool(outcome), "", is_writer=False)


def check_run(
    run_dir: str,
    resolved_config: Mapping[str, Any],
    *,
    on_existing: OnExisting = "resume",
    may_differ: frozenset[str] = frozenset(),
) -> None:
    """Refuse what ``open_run`` would refuse, before the work that comes ahead of it; writes nothing.

    Raises:
      UserError: as ``open_run``.
    """
    _look(run_dir, resolved_config, on_existing, may_differ)


def _open(
    run_dir: str,
    config: Mapping[str, Any],
    on_existing: OnExisting,
    may_differ: frozenset[str],
    command: list[str] | None,
    devices: Mapping[str, Any] | None,
) -> RunFolder:
    path, record, changed, message = _look(run_dir, config, on_existing, may_differ)
    launch = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv if command is None else command),
        "changed": [list(change) for change in changed],
        "versions": package_versions(),
        "devices": dict(describe_devices() if devices is None else devices),
        "git": git_state(),
    }
    try:
        if record is not None and on_existing == "restart":
            aside = rename_aside(path)
            message, record = f"{run_dir} is new; the run that was there is now {aside}", None
        path.mkdir(parents=True, exist_ok=True)
        launches = [*record["launches"], launch] if record is not None else [launch]
        atomic.write_json(path / "run.json", {"config": config, "launches": launches})
    except OSError as error:
        raise _unusable(run_dir, str(error.strerror)) from error
    return RunFolder(path, record is not None, message)


def _look(
    run_dir: str, config: Mapping[str, Any], on_existing: OnExisting, may_differ: frozenset[str]
) -> tuple[Path, dict[str, Any] | None, list[tuple[str, Any, Any]], str]:
    """The folder's path, its ``run.json`` if it holds a run, how the configs differ, and a message."""
    path = checked_path(run_dir)
    try:
        record = _read_record(path, run_dir)
        check_writable(path, run_dir)
    except OSError as error:
        raise _unusable(run_dir, str(error.strerror)) from error
    if record is None:
        return path, None, [], f"{run_dir} is new"
    changed: list[tuple[str, Any, Any]] = []
    message = since = f"{run_dir} holds a run started {record['launches'][0]['started']}"
    if on_existing == "error":
        raise UserError(f"{since}; {what_to_type(run_dir, ('resume', 'restart'))}")
    if on_existing == "resume":
        changed = differences(upgraded(record["config"], config), config)
        _check_same_config(changed, may_differ, run_dir)
        message = f"{since}, launched {_times(len(record['launches']))}; continuing it"
    return path, record, changed, message


def check_writable(path: Path, run_dir: str) -> None:
    """Refuse a path whose nearest folder that exists is no folder, or takes no files.

    Raises:
      UserError: naming it; ``run_dir`` is how ``config.run_dir`` spells the path.
    """
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise _unusable(run_dir, f"{nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unusable(run_dir, f"no permission to write in {nearest}")


def _unusable(run_dir: str, reason: str) -> UserError:
    return UserError(
        f"{option('run_dir')} is {run_dir!r}, which cannot be written ({reason}); "
        f"required a folder that can, e.g. {flag('run_dir')}=runs/first"
    )


def checked_path(run_dir: str) -> Path:
    """Return the folder that ``config.run_dir`` names.

    Raises:
      UserError: it names none, or one that is not in the file system.
    """
    if not run_dir:
        raise UserError(f"{option('run_dir')} is empty; required a folder, e.g. {flag('run_dir')}=runs/first")
    if "://" in run_dir:
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, a URL; required a folder, such as one that mounts the bucket"
        )
    return Path(run_dir).expanduser()


def _read_record(path: Path, run_dir: str) -> dict[str, Any] | None:
    """The ``run.json`` of the run in the folder; None for a folder that is absent or empty."""
    if not path.exists():
        return None
    another = f"required an empty or a new folder, e.g. {flag('run_dir')}={_next(run_dir)}"
    if not path.is_dir():
        raise UserError(f"{option('run_dir')} is {run_dir!r}, which is a file; {another}")
    names = sorted(entry.name for entry in path.iterdir() if not atomic.is_unfinished(entry.name))
    if not names:
        return None
    if "run.json" not in names:
        raise UserError(f"{option('run_dir')} is {run_dir!r}, which is no run but holds {names[0]!r}; {another}")
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return {"config": dict(record["config"]), "launches": [{**launch} for launch in record["launches"]]}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path / 'run.json'} cannot be read ({error}); {another}") from error


def _check_same_config(changed: list[tuple[str, Any, Any]], may_differ: frozenset[str], run_dir: str) -> None:
    wrong = [
        f"{option(name)} was {old!r} and is {new!r}"
        for name, old, new in changed
        if not any(name == free or name.startswith(f"{free}.") for free in may_differ)
    ]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which holds a run of another config: "
            f"{', '.join(wrong[:_SHOWN])}{more}; "
            f"{what_to_type(run_dir, ('restart',))}"
        )


def what_to_type(run_dir: str, choices: tuple[str, ...]) -> str:
    """Say what to do about a folder that is taken: the ``choices`` of ``config.on_existing``, or another folder."""
    meaning = {"resume": "continue it", "restart": "put it aside and start anew"}
    ways = [f"{flag('on_existing')}={choice} to {meaning[choice]}" for choice in choices]
    return f"use {', '.join(ways)}, or another folder, e.g. {flag('run_dir')}={_next(run_dir)}"


def _next(run_dir: str) -> str:
    return f"{run_dir.rstrip('/')}-2"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def rename_aside(path: Path) -> Path:
    """Rename a folder to the first of ``path.1``, ``path.2``, … that is free, and return that."""
    path = path.resolve()
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(aside)


def from_writer(outcome: int, is_writer: bool) -> int:
    """Return the writer's ``outcome``, an int32, in every process."""
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(outcome), is_source=is_writer))
