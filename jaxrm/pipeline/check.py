"""Checks of all stages of a pipeline before the first of them runs.

A stage is checked on what the stages before it will have left. Where a run is not done yet, a stand-in takes its place
in a temporary folder: its config, the shape and the tokenizer of its model, and the records that it will write, without
any weights.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.config import dicts
from jaxrm.errors import UserError, naming
from jaxrm.inference import parameters
from jaxrm.inference.base import keep_base
from jaxrm.inference.load import save_shape_and_tokenizer
from jaxrm.pipeline.config import Pipeline, resolve
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stage_config import TrainingConfig
from jaxrm.stages.inspection import Inspection


@dataclass(frozen=True)
class StageCheck:
    """What the check of a stage came to.

    Attributes:
      inspection: what the stage would do; None where it cannot run, or is not checked.
      error: why it cannot run.
      waits_for: stages that cannot run, without which this one cannot be checked.
    """

    inspection: Inspection | None = None
    error: UserError | None = None
    waits_for: tuple[str, ...] = ()


def check_stages(
    config: Pipeline, done: frozenset[str], inspect_stage: Callable[[Any], Inspection]
) -> dict[str, StageCheck]:
    """Check the stages that are to run, in their order; nothing is written that stays.

    Args:
      config: the pipeline.
      done: stages whose runs are there, which are not checked.
      inspect_stage: what a stage would do, from its config.
    """
    checks: dict[str, StageCheck] = {}
    with tempfile.TemporaryDirectory(prefix="jaxrm-check-") as name:
        stand_ins = {stage: f"{name}/{stage}" for stage in config.stages if stage not in done}
        stages = resolve(config, stand_ins)
        real = {stand_ins[stage]: stages[stage].experiment.run_dir for stage in stand_ins}
        for stage in stand_ins:
            waits_for = tuple(
                needed for needed in dict.fromkeys(stages[stage].needs.values())
                if needed in stand_ins and checks[needed].inspection is None
            )  # fmt: skip
            if waits_for:
                checks[stage] = StageCheck(waits_for=waits_for)
                continue
            # A run of its own may be there, of the same config but for its stand-ins.
            experiment = replace(stages[stage].experiment, run_dir=stand_ins[stage])
            try:
                with naming({"": stages[stage].section}):
                    inspection = inspect_stage(experiment)
            except UserError as error:
                checks[stage] = StageCheck(error=UserError(f"stage {stage}: {_with_real_paths(str(error), real)}"))
                continue
            _write_stand_in(Path(stand_ins[stage]), experiment, inspection)
            reading = {_with_real_paths(title, real): report for title, report in inspection.reading.items()}
            facts = {title: _with_real_paths(fact, real) for title, fact in inspection.facts.items()}
            if writers := [
                needed for field, needed in stages[stage].needs.items()
                if field.endswith(("data.path", "eval_path")) and needed in stand_ins
            ]:  # fmt: skip
                facts["records"] = f"stand-ins for those that {' and '.join(dict.fromkeys(writers))} will write"
            checks[stage] = StageCheck(replace(inspection, reading=reading, facts=facts))
    return checks


def _write_stand_in(folder: Path, config: Any, inspection: Inspection) -> None:
    """Leave what later stages look for in the folder of a run."""
    folder.mkdir(exist_ok=True)
    atomic.write_json(folder / "run.json", {"config": dicts.to_dict(config), "launches": []})
    for name, rows in inspection.outputs.items():
        atomic.write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if inspection.shape is None or inspection.tokenizer is None:
        return
    run = RunFolder(folder, resumed=False, message="")
    save_shape_and_tokenizer(inspection.shape, inspection.tokenizer, run)
    if isinstance(config, TrainingConfig) and config.lora.is_on:
        keep_base(run, parameters.located_base(config.model, config.seed))
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.save(0, {}, {}, loss=0.0)  # no arrays: it is looked for, and never read
    checkpoints.close()


def _with_real_paths(text: str, real: Mapping[str, str]) -> str:
    """The text with the folder of a run in place of its stand-in's."""
    for stand_in, folder in real.items():
        text = text.replace(f"{stand_in}, step 0", folder).replace(stand_in, folder)
    return text
