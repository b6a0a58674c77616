"""The record of a pipeline: which launches it had, which of its stages are done, and what it refuses to continue."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxrm import atomic
from jaxrm.config import dicts
from jaxrm.errors import UserError, flag, naming, option
from jaxrm.pipeline.config import Pipeline, PipelineStage, resolve
from jaxrm.runtime import run_lock
from jaxrm.runtime.folders import check_writable, checked_path, rename_aside, unusable, what_to_type
from jaxrm.runtime.provenance import code_digest
from jaxrm.runtime.run_folder import check_run, from_writer
from jaxrm.runtime.run_record import is_same_launch, now
from jaxrm.stage_config import RESUMABLE_FIELDS

RECORD = "pipeline.json"

StageRecords = dict[str, dict[str, Any]]
"""By the name of a stage: ``state``, ``seconds`` and ``config``."""


@dataclass
class PipelineRecord:
    """What ``pipeline.json`` holds.

    Attributes:
      config: of the latest launch.
      launches: one entry for each: ``started``, ``command``, ``code``, and ``ended`` where all stages were done then.
      stages: the records of the stages.
    """

    config: dict[str, Any] = field(default_factory=dict)
    launches: list[dict[str, Any]] = field(default_factory=list)
    stages: StageRecords = field(default_factory=dict)


def write_record(path: Path, record: PipelineRecord, is_writer: bool) -> None:
    """Write ``pipeline.json``, if this process writes."""
    if is_writer:
        atomic.write_json(path / RECORD, dataclasses.asdict(record))


def open_record(
    path: Path, config: Pipeline, stages: Mapping[str, PipelineStage], is_writer: bool
) -> tuple[PipelineRecord, set[str]]:
    """Lock the pipeline's folder; the record in it, and the stages that are done. All processes agree on the latter.

    Only the writer reads the folder. It sends the others which stages are done, or that it refuses to run.
    """
    record = PipelineRecord()
    refusal: UserError | None = None
    outcome = 0
    if is_writer:
        try:
            record, done = _open_folder(path, config, stages)
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
    return record, {name for i, name in enumerate(stages) if outcome >> i & 1}


def stages_done(config: Pipeline) -> set[str]:
    """The stages whose runs are there; nothing is written.

    Raises:
      UserError: for a folder that cannot be continued as the config says.
    """
    return _examine(checked_path(config.run_dir), config, resolve(config))[1]


def _examine(
    path: Path, config: Pipeline, stages: Mapping[str, PipelineStage]
) -> tuple[PipelineRecord, set[str], bool]:
    """The record as this launch continues it, the stages that are done, and whether the folder is put aside."""
    resolved, record = dicts.to_dict(config), _read_record(path, config)
    # A job that was stopped and queued again has its restart in the command still (`is_same_launch`).
    is_continued = is_same_launch(dataclasses.asdict(record), resolved)
    restarts = config.on_existing == "restart" and not is_continued
    if restarts:
        record = PipelineRecord()
    if not is_continued:
        for name in config.stages:
            if stages[name].experiment.on_existing == "restart":
                record.stages.pop(name, None)
    return record, _done(config, stages, record.stages, restarts=restarts), restarts


def _open_folder(path: Path, config: Pipeline, stages: Mapping[str, PipelineStage]) -> tuple[PipelineRecord, set[str]]:
    run_dir = config.run_dir
    run_lock.check_free(path, run_dir)
    record, done, restarts = _examine(path, config, stages)
    try:
        path.mkdir(parents=True, exist_ok=True)
        run_lock.take(path, run_dir)
        if restarts and not all(run_lock.is_no_content(entry.name) for entry in path.iterdir()):
            run_lock.give_back(path)
            print(f"{run_dir} is new; what was there is now {rename_aside(path)}", flush=True)
            path.mkdir()
            run_lock.take(path, run_dir)
        atomic.remove_unfinished(path)
    except OSError as error:
        raise unusable(run_dir, str(error.strerror)) from error
    record.config = dicts.to_dict(config)
    record.launches.append({"started": now(), "command": list(sys.argv), "code": code_digest()})
    return record, done


def _read_record(path: Path, config: Pipeline) -> PipelineRecord:
    """The record of earlier launches; refuses a folder that holds something else."""
    run_dir = config.run_dir
    check_writable(path, run_dir)
    entries = [entry.name for entry in path.iterdir()] if path.exists() else []
    names = sorted(name for name in entries if not run_lock.is_no_content(name))
    if not names:
        return PipelineRecord()
    if RECORD not in names and "run.json" not in names:
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which is no pipeline but holds {names[0]!r}; required an empty or "
            f"a new folder, e.g. {flag('run_dir')}={run_dir.rstrip('/')}-2"
        )
    content = "a pipeline" if RECORD in names else "a single run"
    if config.on_existing == "error" or (config.on_existing == "resume" and RECORD not in names):
        choices = ("resume", "restart") if RECORD in names else ("restart",)
        raise UserError(f"{run_dir} holds {content}; {what_to_type(run_dir, choices)}")
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        stages = {
            name: {"state": str(stage["state"]), "seconds": float(stage["seconds"]), "config": dict(stage["config"])}
            for name, stage in record["stages"].items()
        }
        launches = [{**launch} for launch in record.get("launches", [])]
        return PipelineRecord(dict(record.get("config", {})), launches, stages)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if config.on_existing == "restart":
            return PipelineRecord()
        advice = what_to_type(run_dir, ("restart",))
        raise UserError(f"{path / RECORD} cannot be read ({error}); {advice}") from error


def _done(config: Pipeline, stages: Mapping[str, PipelineStage], records: StageRecords, *, restarts: bool) -> set[str]:
    """The stages that are done; refuses what cannot be continued as the config says.

    Args:
      config: the pipeline.
      stages: all of its stages.
      records: of earlier launches, without those of stages that start anew.
      restarts: whether the whole pipeline is put aside.
    """
    done, new = set(), set()
    for name, stage in stages.items():
        experiment = stage.experiment
        exists = (Path(experiment.run_dir).expanduser() / "run.json").is_file()
        is_done = records.get(name, {}).get("state") == "done"
        if restarts and _is_inside(experiment.run_dir, config.run_dir):
            exists = False  # it is put aside with the pipeline
            with naming({"": stage.section}):
                run_lock.check_free(Path(experiment.run_dir).expanduser(), experiment.run_dir)
        elif name in config.stages:
            _check_stage(stage)
        if not exists or (name in config.stages and experiment.on_existing == "restart" and not is_done):
            new.add(name)
        elif is_done:
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
    for where, needed in stages[name].needs.items():
        if name in config.stages and needed not in config.stages and needed not in done:
            running = ",".join(known for known in stages if known in (needed, *config.stages))
            raise UserError(
                f"{where} refers to the stage {needed}, which is not done in {stages[needed].experiment.run_dir} "
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
