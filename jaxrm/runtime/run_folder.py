"""The folder of a run: what it holds, when it may be continued, and how it says where it came from.

    run_dir/
      run.json        resolved config; one entry per launch: time, command, versions, devices, git commit
      metrics.jsonl   one row per logged step (``metrics``)
      samples.jsonl   generated samples
      checkpoints/    whole states
      model.json      shape of the model
      tokenizer/      the tokenizer that it was trained with
      tensorboard/    the metrics again
      .lock           which process is working here, while one is (``run_lock``)

Nothing is ever deleted: a run that is started anew finds its old folder beside the new one, as ``run_dir.1``.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxrm import atomic
from jaxrm.config.dicts import differences
from jaxrm.config.recorded import upgraded
from jaxrm.errors import UserError, option
from jaxrm.runtime import run_lock
from jaxrm.runtime.folders import check_writable, checked_path, rename_aside, unusable, what_to_type
from jaxrm.runtime.provenance import code_digest, describe_devices, git_state, package_versions
from jaxrm.runtime.run_record import check_same_config, is_same_launch, now, read_record

# A run records what it decided where its config says this (`jaxrm.stages.remat`).
_AUTO_REMAT = ("model.remat", "auto")

OnExisting = Literal["resume", "restart", "error"]


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
    """Make the folder of a run, or find the run that it holds, lock it, and note this launch in ``run.json``.

    Where several processes take part, all call this; the writer decides and the others learn what it decided. The
    writer has the lock until `jaxrm.runtime.run_lock.give_back`.

    Args:
      run_dir: the folder; its parents are made.
      resolved_config: the config as ``jaxrm.config.dicts.to_dict`` gives it.
      on_existing: what to do with a folder that holds a run: "resume" continues it if the configs agree,
          "restart" renames it aside to ``run_dir.1``, unless this very command began it and was stopped; "error"
          refuses.
      may_differ: dotted names (without ``config.``), or patterns of them, of fields and sections that may change
          between launches, such as ``mesh``, since a checkpoint restores on another one.
      is_writer: whether this process writes; exactly one does.
      process_count: the number of processes that call this.
      command: the command line, ``sys.argv`` by default.
      devices: what ``run.json`` says of the devices; those of JAX by default.

    Raises:
      UserError: the folder belongs to another config, holds something that is no run, is in use by another process,
          or cannot be written.
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
    path = _look(run_dir, config, on_existing, may_differ).path
    try:
        path.mkdir(parents=True, exist_ok=True)
        run_lock.take(path, run_dir)
        present = _look(run_dir, config, on_existing, may_differ)  # again, since now nobody else writes there
        record, message = present.record, present.message
        if present.starts_anew:
            run_lock.give_back(path)
            message, record = f"{run_dir} is new; the run that was there is now {rename_aside(path)}", None
            path.mkdir(parents=True, exist_ok=True)
            run_lock.take(path, run_dir)
        atomic.remove_unfinished(path)
        launch = {
            "started": now(),
            "command": list(sys.argv if command is None else command),
            "changed": [list(change) for change in present.changed],
            "versions": package_versions(),
            "devices": dict(describe_devices() if devices is None else devices),
            "git": git_state(),
            "code": code_digest(),
        }
        launches = [*record["launches"], launch] if record is not None else [launch]
        atomic.write_json(path / "run.json", {"config": config, "launches": launches})
    except OSError as error:
        run_lock.give_back(path)
        raise unusable(run_dir, str(error.strerror)) from error
    except BaseException:
        run_lock.give_back(path)
        raise
    return RunFolder(path, record is not None, message)


class _Present(NamedTuple):
    """What is in the folder that a run is to have.

    Attributes:
      path: of the folder.
      record: its ``run.json``; None where it holds no run.
      starts_anew: whether the run that it holds is to be put aside.
      changed: how the configs differ, for a run that is continued.
      message: the same for the console.
    """

    path: Path
    record: dict[str, Any] | None
    starts_anew: bool
    changed: list[tuple[str, Any, Any]]
    message: str


def _look(run_dir: str, config: Mapping[str, Any], on_existing: OnExisting, may_differ: frozenset[str]) -> _Present:
    path = checked_path(run_dir)
    try:
        record = read_record(path, run_dir)
        check_writable(path, run_dir)
    except OSError as error:
        raise unusable(run_dir, str(error.strerror)) from error
    if record is None:
        return _Present(path, None, False, [], f"{run_dir} is new")
    run_lock.check_free(path, run_dir)
    since = f"{run_dir} holds a run started {record['launches'][0].get('started', 'at an unknown time')}"
    if on_existing == "error":
        raise UserError(f"{since}; {what_to_type(run_dir, ('resume', 'restart'))}")
    changed = [each for each in differences(upgraded(record["config"], config), config) if each[::2] != _AUTO_REMAT]
    if on_existing == "restart":
        if not is_same_launch(record, config):
            return _Present(path, record, True, [], since)
        message = (
            f"{since} by this very command, which has not ended; continuing it (to start it anew, rename the folder)"
        )
        return _Present(path, record, False, changed, message)
    check_same_config(changed, may_differ, run_dir, str(config.get("algorithm", "")))
    return _Present(path, record, False, changed, f"{since}, launched {_times(len(record['launches']))}; continuing it")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def from_writer(outcome: int, is_writer: bool) -> int:
    """Return the writer's ``outcome``, an int32, in every process."""
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(outcome), is_source=is_writer))
