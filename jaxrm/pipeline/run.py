"""Running a pipeline: one stage after another in this process, each continued from where it stopped.

In ``run_dir`` are ``NAME/``, the run of each stage; ``pipeline.json``, which says of each whether it is running or
done, its config, and the seconds spent on it (without those of launches that were killed); and ``report.html``, once
all are done.
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
from jaxrm.experiment import RESUMABLE_FIELDS, Experiment
from jaxrm.pipeline import report as pipeline_report
from jaxrm.pipeline.config import Pipeline, Stage, resolve
from jaxrm.runtime.progress import format_seconds
from jaxrm.runtime.run_folder import check_run, check_writable, checked_path, from_writer, rename_aside, what_to_type

_RECORD = "pipeline.json"

Records = dict[str, dict[str, Any]]


def run(config: Pipeline, run_stage: Callable[[Experiment], int]) -> int:
    """Run the stages of a pipeline that are not done, and say what came of all.

    Args:
      config: the pipeline.
      run_stage: runs one stage and returns its exit status, 0 for done.

    Returns:
      Exit status: 0 when all are done, else that of the stage that was not, which ends the pipeline.

    Raises:
      UserError: for what the user can mend in the pipeline, before a stage has run; and what a stage raises, with its
        name.
    """
    path = checked_path(config.run_dir)
    stages = resolve(config)
    is_writer = jax.process_index() == 0
    say: Callable[[str], None] = (lambda line: print(line, flush=True)) if is_writer else (lambda _: None)
    records, done = _open(path, config, stages, is_writer)

    for number, name in enumerate(config.stages, 1):
        stage, place = stages[name], f"stage {number} of {len(config.stages)}"
        if name in done:
            seconds = records[name]["seconds"] if is_writer else 0.0
            say(f"{name}: done in {format_seconds(seconds)}, {stage.experiment.run_dir}")
            continue
        say(f"\n{place}: {name}")
        status = _run_stage(path, stage, records, run_stage, is_writer)
        if status:
            again = "".join(f" with --{field}=resume" for field in _restarted(config, stage))
            say(f"The pipeline stopped in {place}, {name}; the same command{again} continues it.")
            return status
        done.add(name)
        say(f"{name}: done in {format_seconds(records[name]['seconds'])}")
        _release()

    if is_writer:
        seconds_by_name = {name: float(records[name]["seconds"]) for name in stages if name in done}
        pipeline_report.close(path, [stages[name] for name in seconds_by_name], seconds_by_name)
    return 0


def _run_stage(
    path: Path, stage: Stage, records: Records, run_stage: Callable[[Experiment], int], is_writer: bool
) -> int:
    """Run one stage and keep its record, however it ends."""
    name, before = stage.name, records.get(stage.name, {}).get("seconds", 0.0)
    config = dicts.to_dict(stage.experiment)
    started, state = time.monotonic(), "running"

    def keep() -> None:
        seconds = round(before + time.monotonic() - started, 3)
        records[name] = {"state": state, "seconds": seconds, "config": config}
        if is_writer:
            path.mkdir(parents=True, exist_ok=True)
            atomic.write_json(path / _RECORD, {"stages": records})

    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    keep()
    try:
        with naming({"": stage.where}):
            status = run_stage(stage.experiment)
        state = "running" if status else "done"
    except UserError as error:
        if is_writer:
            _remove_if_empty(missing)
        raise UserError(f"stage {name}: {error}") from error
    finally:
        if path.exists():
            keep()
    return status


def _restarted(config: Pipeline, stage: Stage) -> list[str]:
    """The fields by which the stage would start anew at each launch."""
    given = {"on_existing": config.on_existing, f"{stage.where}.on_existing": stage.experiment.on_existing}
    return [field for field, on_existing in given.items() if on_existing == "restart"]


def _release() -> None:
    """Free what a stage left in memory: its arrays, and the programs compiled for its shapes."""
    gc.collect()
    jax.clear_caches()


def _remove_if_empty(folders: Iterable[Path]) -> None:
    """Take away folders that were made for a stage which then refused to write anything; innermost first."""
    for folder in folders:
        if [entry.name for entry in folder.iterdir()] == [_RECORD]:
            (folder / _RECORD).unlink()
        if any(folder.iterdir()):
            return
        folder.rmdir()


def _open(path: Path, config: Pipeline, stages: Mapping[str, Stage], is_writer: bool) -> tuple[Records, set[str]]:
    """The records of the pipeline in the folder, and the stages that are done; all processes agree on these."""
    records: Records = {}
    refused: UserError | None = None
    outcome = 0
    if is_writer:
        try:
            records = _records(path, config)
            done = _done(config, stages, records)
            if config.on_existing == "restart" and path.exists() and any(path.iterdir()):
                print(f"{config.run_dir} is new; what was there is now {rename_aside(path)}", flush=True)
            outcome = sum(1 << i for i, name in enumerate(stages) if name in done)
        except UserError as error:
            refused, outcome = error, -1
    if jax.process_count() > 1:
        assert len(stages) < 32, "which stages are done goes to the other processes as the bits of an int32"
        outcome = from_writer(outcome, is_writer)
    if refused is not None:
        raise refused
    if outcome < 0:
        raise UserError(
            f"{option('run_dir')} is {config.run_dir!r}, which the first process refused; its message says why"
        )
    return records, {name for i, name in enumerate(stages) if outcome >> i & 1}


def _records(path: Path, config: Pipeline) -> Records:
    """What ``pipeline.json`` says; nothing for a folder that is new, or that is to be put aside."""
    run_dir = config.run_dir
    check_writable(path, run_dir)
    entries = [entry.name for entry in path.iterdir()] if path.exists() else []
    names = sorted(name for name in entries if not atomic.is_unfinished(name))
    if not names:
        return {}
    if _RECORD not in names and "run.json" not in names:
        raise UserError(
            f"{option('run_dir')} is {run_dir!r}, which is no pipeline but holds {names[0]!r}; required an empty or "
            f"a new "
            f"folder, e.g. {flag('run_dir')}={run_dir.rstrip('/')}-2"
        )
    what = "a pipeline" if _RECORD in names else "a single run"
    if config.on_existing == "error" or (config.on_existing == "resume" and _RECORD not in names):
        choices = ("resume", "restart") if _RECORD in names else ("restart",)
        raise UserError(f"{run_dir} holds {what}; {what_to_type(run_dir, choices)}")
    if config.on_existing == "restart":
        return {}
    try:
        found = json.loads((path / _RECORD).read_text(encoding="utf-8"))["stages"]
        return {
            name: {"state": str(one["state"]), "seconds": float(one["seconds"]), "config": dict(one["config"])}
            for name, one in found.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        advice = what_to_type(run_dir, ("restart",))
        raise UserError(f"{path / _RECORD} cannot be read ({error}); {advice}") from error


def _done(config: Pipeline, stages: Mapping[str, Stage], records: Records) -> set[str]:
    """The stages that are done; refuses what cannot be continued as the config says."""
    done, anew = set(), set()
    for name, stage in stages.items():
        run_dir, on_existing = stage.experiment.run_dir, stage.experiment.on_existing
        exists = (Path(run_dir).expanduser() / "run.json").is_file()
        if config.on_existing == "restart" and _is_inside(run_dir, config.run_dir):
            exists = False  # it goes aside with the pipeline
        elif name in config.stages:
            try:
                with naming({"": stage.where}):
                    check_run(
                        run_dir, dicts.to_dict(stage.experiment), on_existing=on_existing, may_differ=RESUMABLE_FIELDS
                    )
            except UserError as error:
                message = str(error)
                if f"--{stage.where}.on_existing=restart" in message:
                    message += f"; {flag('on_existing')}=restart starts the whole pipeline anew"
                raise UserError(message) from error
        if not exists or (name in config.stages and on_existing == "restart"):
            anew.add(name)
        elif records.get(name, {}).get("state") == "done":
            done.add(name)
    for name in stages:
        if name not in config.stages and name not in done:
            continue
        for field, needed in stages[name].needs.items():
            if name in config.stages and needed not in config.stages and needed not in done:
                running = ",".join(known for known in stages if known in (needed, *config.stages))
                raise UserError(
                    f"{field} refers to the stage {needed}, which is not done in {stages[needed].experiment.run_dir} "
                    f"and not among those to run; e.g. {flag('stages')}={running}"
                )
            if needed in anew and needed in config.stages and name not in anew:
                raise UserError(
                    f"{option(f'{name}.on_existing')} is {stages[name].experiment.on_existing!r}, but its run is "
                    f"built on "
                    f"{needed}, which starts anew; use {flag(f'{name}.on_existing')}=restart to start it anew too; "
                    f"{flag('on_existing')}=restart starts the whole pipeline anew"
                )
    return done


def _is_inside(folder: str, outer: str) -> bool:
    return Path(folder).expanduser().resolve().is_relative_to(Path(outer).expanduser().resolve())
