"""Run a pipeline: one stage after another in this process, each continued from where it stopped.

The pipeline's folder holds

- ``NAME/``: the run of each stage;
- ``pipeline.json``: for each stage whether it is running or done, its config, and the seconds spent on it (without
  those of launches that were killed);
- ``report.html``, once all stages are done.
"""

import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrm import atomic
from jaxrm.config import dicts
from jaxrm.errors import UserError, flag, naming, option
from jaxrm.pipeline.config import Pipeline, PipelineStage, resolve
from jaxrm.pipeline.report import publish
from jaxrm.runtime.progress import format_seconds
from jaxrm.runtime.run_folder import check_run, check_writable, checked_path, from_writer, rename_aside, what_to_type
from jaxrm.stage_config import RESUMABLE_FIELDS, StageConfig

_RECORD = "pipeline.json"

StageRecords = dict[str, dict[str, Any]]
"""By the name of a stage: ``state``, ``seconds`` and ``config``."""


def run_pipeline(config: Pipeline, run_stage: Callable[[StageConfig], int]) -> int:
    """Run the stages of a pipeline that are not done, then print its tables and write its report.

    Args:
      config: the pipeline.
      run_stage: runs one stage and returns its exit status, 0 for done.

    Returns:
      Exit status: 0 when all stages are done, else that of the stage that was not, which ends the pipeline.

    Raises:
      UserError: for mistakes in the pipeline, before a stage has run; and what a stage raises, with its name.
    """
    path = checked_path(config.run_dir)
    stages = resolve(config)
    is_writer = jax.process_index() == 0
    records, done = _open(path, config, stages, is_writer)

    for number, name in enumerate(config.stages, 1):
        stage, position = stages[name], f"stage {number} of {len(config.stages)}"
        if name in done:
            if is_writer:
                seconds = format_seconds(records[name]["seconds"])
                print(f"{name}: done in {seconds}, {stage.experiment.run_dir}", flush=True)
            continue
        if is_writer:
            print(f"\n{position}: {name}", flush=True)
        status = _run_stage(path, stage, records, run_stage, is_writer)
        if status:
            options = "".join(f" with {restarting}=resume" for restarting in _restarting_flags(config, stage))
            if is_writer:
                print(
                    f"The pipeline stopped in {position}, {name}; the same command{options} continues it.", flush=True
                )
            return status
        done.add(name)
        if is_writer:
            print(f"{name}: done in {format_seconds(records[name]['seconds'])}", flush=True)
        _release()

    if is_writer:
        seconds_by_name = {name: float(records[name]["seconds"]) for name in stages if name in done}
        publish(path, [stages[name] for name in seconds_by_name], seconds_by_name)
    return 0


def _run_stage(
    path: Path, stage: PipelineStage, records: StageRecords, run_stage: Callable[[StageConfig], int], is_writer: bool
) -> int:
    """Run one stage; its record is written before it starts and when it ends, however it ends."""
    name = stage.name
    seconds_before = records.get(name, {}).get("seconds", 0.0)
    new_folders = [folder for folder in (path, *path.parents) if not folder.exists()]
    records[name] = {"state": "running", "seconds": seconds_before, "config": dicts.to_dict(stage.experiment)}
    _write_records(path, records, is_writer)
    started = time.monotonic()
    try:
        with naming({"": stage.section}):
            status = run_stage(stage.experiment)
        records[name]["state"] = "running" if status else "done"
    except UserError as error:
        if is_writer:
            _remove_if_empty(new_folders)
        raise UserError(f"stage {name}: {error}") from error
    finally:
        records[name]["seconds"] = round(seconds_before + time.monotonic() - started, 3)
        if path.exists():
            _write_records(path, records, is_writer)
    return status


def _write_records(path: Path, records: StageRecords, is_writer: bool) -> None:
    if is_writer:
        path.mkdir(parents=True, exist_ok=True)
        atomic.write_json(path / _RECORD, {"stages": records})


def _restarting_flags(config: Pipeline, stage: PipelineStage) -> list[str]:
    """The flags that make the stage start anew at each launch."""
    values = {"on_existing": config.on_existing, f"{stage.name}.on_existing": stage.experiment.on_existing}
    return [flag(name) for name, on_existing in values.items() if on_existing == "restart"]


def _release() -> None:
    """Free what a stage left in memory: its arrays, and the programs compiled for its shapes."""
    gc.collect()
    jax.clear_caches()


def _remove_if_empty(folders: Iterable[Path]) -> None:
    """Remove folders that were made for a stage which then refused its config; innermost first."""
    for folder in folders:
        if [entry.name for entry in folder.iterdir()] == [_RECORD]:
            (folder / _RECORD).unlink()
        if any(folder.iterdir()):
            return
        folder.rmdir()


def _open(
    path: Path, config: Pipeline, stages: Mapping[str, PipelineStage], is_writer: bool
) -> tuple[StageRecords, set[str]]:
    """The records in the pipeline's folder, and the stages that are done. All processes agree on the latter.

    Only the writer reads the folder. It sends the others which stages are done, or that it refuses to run.
    """
    records: StageRecords = {}
    refusal: UserError | None = None
    outcome = 0
    if is_writer:
        try:
            records = _read_records(path, config)
            done = _done(config, stages, records)
            if config.on_existing == "restart" and path.exists() and any(path.iterdir()):
                print(f"{config.run_dir} is new; what was there is now {rename_aside(path)}", flush=True)
            outcome = sum(1 << i for i, name in enumerate(stages) if name in done)
        except UserError as error:
            refusal, outcome = error, -1
    if jax.process_count() > 1:
        assert len(stages) < 32, "which stages are done is sent to the other processes as the bits of an int32"
        outcome = from_writer(outcome, is_writer)
    if refusal is not None:
        raise refusal
    if outcome < 0:
        raise UserError(
            f"{option('run_dir')} is {config.run_dir!r}, which the first process refused; its message says why"
        )
    return records, {name for i, name in enumerate(stages) if outcome >> i & 1}


def _read_records(path: Path, config: Pipeline) -> StageRecords:
    """The records of earlier launches; refuses a folder that holds something else."""
    run_dir = config.run_dir
    check_writable(path, run_dir)
    entries = [entry.name for entry in path.iterdir()] if path.exists() else []
    names = sorted(name for name in entries if not atomic.is_unfinished(name))
    if not names:
        return {}
    if _RECORD not in names and "run.json" not in names:
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which is no pipeline but holds {names[0]!r}; required an empty or "
            f"a new folder, e.g. {flag('run_dir')}={run_dir.rstrip('/')}-2"
        )
    content = "a pipeline" if _RECORD in names else "a single run"
    if config.on_existing == "error" or (config.on_existing == "resume" and _RECORD not in names):
        choices = ("resume", "restart") if _RECORD in names else ("restart",)
        raise UserError(f"{run_dir} holds {content}; {what_to_type(run_dir, choices)}")
    if config.on_existing == "restart":
        return {}
    try:
        records = json.loads((path / _RECORD).read_text(encoding="utf-8"))["stages"]
        return {
            name: {"state": str(record["state"]), "seconds": float(record["seconds"]), "config": dict(record["config"])}
            for name, record in records.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        advice = what_to_type(run_dir, ("restart",))
        raise UserError(f"{path / _RECORD} cannot be read ({error}); {advice}") from error


def _done(config: Pipeline, stages: Mapping[str, PipelineStage], records: StageRecords) -> set[str]:
    """The stages that are done; refuses what cannot be continued as the config says."""
    done, new = set(), set()
    for name, stage in stages.items():
        experiment = stage.experiment
        exists = (Path(experiment.run_dir).expanduser() / "run.json").is_file()
        if config.on_existing == "restart" and _is_inside(experiment.run_dir, config.run_dir):
            exists = False  # it is put aside with the pipeline
        elif name in config.stages:
            _check_stage(stage)
        if not exists or (name in config.stages and experiment.on_existing == "restart"):
            new.add(name)
        elif records.get(name, {}).get("state") == "done":
            done.add(name)
    for name in stages:
        if name in config.stages or name in done:
            _check_needs(config, stages, name, done, new)
    return done


def _check_stage(stage: PipelineStage) -> None:
    """Refuse a run of the stage that another config made."""
    experiment = stage.experiment
    try:
        with naming({"": stage.section}):
            check_run(
                experiment.run_dir,
                dicts.to_dict(experiment),
                on_existing=experiment.on_existing,
                may_differ=RESUMABLE_FIELDS,
            )
    except UserError as error:
        message = str(error)
        if f"--{stage.section}.on_existing=restart" in message:
            message += f"; {flag('on_existing')}=restart starts the whole pipeline anew"
        raise UserError(message) from error


def _check_needs(
    config: Pipeline, stages: Mapping[str, PipelineStage], name: str, done: set[str], new: set[str]
) -> None:
    """Refuse a stage that needs one which neither runs nor is done, or whose run is older than what it needs.

    Args:
      config: the pipeline.
      stages: all of its stages.
      name: of the stage.
      done: stages that are done.
      new: stages that have no run, or start anew.
    """
    for field, needed in stages[name].needs.items():
        if name in config.stages and needed not in config.stages and needed not in done:
            running = ",".join(known for known in stages if known in (needed, *config.stages))
            raise UserError(
                f"{field} refers to the stage {needed}, which is not done in {stages[needed].experiment.run_dir} "
                f"and not among those to run; e.g. {flag('stages')}={running}"
            )
        if needed in new and needed in config.stages and name not in new:
            restart = flag(f"{name}.on_existing")
            raise UserError(
                f"{option(f'{name}.on_existing')} is {stages[name].experiment.on_existing!r}, but its run is built on "
                f"{needed}, which starts anew; use {restart}=restart to start it anew too; "
                f"{flag('on_existing')}=restart starts the whole pipeline anew"
            )


def _is_inside(folder: str, outer: str) -> bool:
    return Path(folder).expanduser().resolve().is_relative_to(Path(outer).expanduser().resolve())
