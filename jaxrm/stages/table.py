"""Which module runs which stage."""

import importlib
from typing import Any

from jaxrm.stage_config import STAGES


def module_of(config: Any) -> str:
    """Name of the module that runs a config."""
    return STAGES[config.algorithm].module


def run_stage(config: Any) -> int:
    """Run one stage.

    Returns:
      Exit status: 0 when it is complete, 75 when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend.
    """
    return importlib.import_module(module_of(config)).run(config)
