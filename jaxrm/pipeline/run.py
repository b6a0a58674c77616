"""Run a pipeline: one stage after another in this process, each continued from where it stopped.

The pipeline's folder holds

- ``NAME/``: the run of each stage;
- ``pipeline.json``: config and launches, and for each stage whether it is running or done, its config, and the seconds
  spent on it (without those of launches that were killed);
- ``report.html``, once all stages are done.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from jaxrm.config import dicts
from jaxrm.errors import UserError, naming
from jaxrm.pipeline.check import check_stages
from jaxrm.pipeline.config import Pipeline, PipelineStage, resolve
from jaxrm.pipeline.record import RECORD, PipelineRecord, open_record, stages_done, write_record
from jaxrm.pipeline.report import publish
from jaxrm.runtime import run_lock
from jaxrm.runtime.folders import checked_path
from jaxrm.runtime.progress import format_seconds
from jaxrm.runtime.run_record import now
from jaxrm.stage_config import StageConfig
from jaxrm.stages.inspection import Inspection


def run_pipeline(
    config: Pipeline, run_stage: Callable[[StageConfig], int], inspect_stage: Callable[[StageConfig], Inspection]
) -> int:
    """Check the stages of a pipeline that are not done and run them, then print its tables and write its report.

    Args:
      config: the pipeline.
      run_stage: runs one stage and returns its exit status, 0 for done.
      inspect_stage: what a stage would do.

    Returns:
      Exit status: 0 when all stages are done, else that of the stage that was not, which ends the pipeline.

    Raises:
      UserError: for mistakes in the pipeline, before a stage has run; and what a stage raises, with its name.
    """
    path = checked_path(config.run_dir)
    stages = resolve(config)
    _check_all(config, inspect_stage)
    with run_lock.given_back():
        return _run_stages(path, config, stages, run_stage)


def _run_stages(
    path: Path, config: Pipeline, stages: Mapping[str, PipelineStage], run_stage: Callable[[StageConfig], int]
) -> int:
    is_writer = jax.process_index() == 0
    new_folders = [folder for folder in (path, *path.parents) if not folder.exists()]
    record, done = open_record(path, config, stages, is_writer)
    for number, name in enumerate(config.stages, 1):
        stage, position = stages[name], f"stage {number} of {len(config.stages)}"
        if name in done:
            if is_writer:
                seconds = format_seconds(record.stages[name]["seconds"])
                print(f"{name}: done in {seconds}, {stage.experiment.run_dir}", flush=True)
            continue
        if is_writer:
            print(f"\n{position}: {name}", flush=True)
        try:
            status = _run_stage(path, stage, record, run_stage, is_writer)
        except UserError as error:
            if is_writer:
                _remove_if_empty(new_folders)
            raise UserError(f"stage {name}: {error}") from error
        if status:
            if is_writer:
                print(f"The pipeline stopped in {position}, {name}; the same command continues it.", flush=True)
            return status
        done.add(name)
        if is_writer:
            print(f"{name}: done in {format_seconds(record.stages[name]['seconds'])}", flush=True)
        _release()

    if is_writer:
        record.launches[-1]["ended"] = now()
        write_record(path, record, is_writer)
        seconds_by_name = {name: float(record.stages[name]["seconds"]) for name in stages if name in done}
        publish(path, [stages[name] for name in seconds_by_name], seconds_by_name)
    return 0


def _check_all(config: Pipeline, inspect_stage: Callable[[StageConfig], Inspection]) -> None:
    """Refuse a stage that cannot run before the first one does.

    Several processes would need a folder that all of them see for the stand-ins, so there each stage is checked when
    its turn comes.
    """
    if jax.process_count() > 1:
        return
    run_lock.check_free(checked_path(config.run_dir), config.run_dir)
    done = stages_done(config)
    waiting = [name for name in config.stages if name not in done]
    if len(waiting) < 2:
        return
    print(f"Checking {len(waiting)} stages before the first one starts: {', '.join(waiting)}", flush=True)
    for check in check_stages(config, frozenset(done), inspect_stage).values():
        if check.error is not None:
            raise check.error


def _run_stage(
    path: Path, stage: PipelineStage, record: PipelineRecord, run_stage: Callable[[StageConfig], int], is_writer: bool
) -> int:
    """Run one stage; its record is written before it starts and when it ends, however it ends."""
    name = stage.name
    seconds_before = record.stages.get(name, {}).get("seconds", 0.0)
    record.stages[name] = {"state": "running", "seconds": seconds_before, "config": dicts.to_dict(stage.experiment)}
    write_record(path, record, is_writer)
    started = time.monotonic()
    is_closing = False
    try:
        with naming({"": stage.section}):
            status = run_stage(stage.experiment)
        record.stages[name]["state"] = "running" if status else "done"
        is_closing = True
    finally:
        record.stages[name]["seconds"] = round(seconds_before + time.monotonic() - started, 3)
        # What ends the stage says more than a disk that takes no record of it.
        with contextlib.nullcontext() if is_closing else contextlib.suppress(OSError):
            write_record(path, record, is_writer)
    return status


def _release() -> None:
    """Free what a stage left in memory: its arrays, and the programs compiled for its shapes."""
    gc.collect()
    jax.clear_caches()


def _remove_if_empty(folders: Sequence[Path]) -> None:
    """Remove folders that were made for a stage which then refused its config; innermost first."""
    if folders:
        run_lock.give_back(folders[0])
    for folder in folders:
        if [entry.name for entry in folder.iterdir()] == [RECORD]:
            (folder / RECORD).unlink()
        if any(folder.iterdir()):
            return
        folder.rmdir()
