"""Which module runs which stage."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax

from jaxrm.runtime import run_lock
from jaxrm.runtime.disk import disk_errors
from jaxrm.runtime.run_record import note_end
from jaxrm.stage_config import STAGES
from jaxrm.stages import remat
from jaxrm.stages.inspection import Inspection


def module_of(config: Any) -> str:
    """Name of the module that runs a config."""
    return STAGES[config.algorithm].module


def run_stage(config: Any) -> int:
    """Run one stage.

    Returns:
      Exit status: 0 when it is complete, 75 when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend.
      StorageError: the disk refused a file.
    """
    config, line = remat.decide(config)
    if line and jax.process_index() == 0:
        print(line, flush=True)
    folder = Path(config.run_dir).expanduser()
    with disk_errors("the run stopped", folder / "checkpoints"), run_lock.given_back():
        status = importlib.import_module(module_of(config)).run(config)
        if status == 0 and jax.process_index() == 0:
            note_end(folder)
        return int(status)


def inspect_stage(config: Any) -> Inspection:
    """What `run_stage` would do; errors are the same, no weights are read and nothing is written."""
    config, line = remat.decide(config)
    inspection: Inspection = importlib.import_module(module_of(config)).inspect(config)
    return dataclasses.replace(inspection, facts={**inspection.facts, "layers": line}) if line else inspection
