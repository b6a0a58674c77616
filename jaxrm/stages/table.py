"""Which module runs which stage."""

import importlib
from typing import Any

MODULES = {
    "sft": "jaxrm.stages.sft",
    "sample_pairs": "jaxrm.stages.sample_pairs",
    "seq2seq_rm": "jaxrm.stages.reward_model.run",
    "scalar_rm": "jaxrm.stages.reward_model.run",
    "ppo": "jaxrm.stages.ppo.run",
    "dpo": "jaxrm.stages.dpo.run",
    "best_of_n": "jaxrm.stages.best_of_n.run",
    "evaluate": "jaxrm.stages.evaluate.run",
}


def module_of(config: Any) -> str:
    """Name of the module that runs a config."""
    return MODULES[config.algorithm]


def run_stage(config: Any) -> int:
    """Run one stage.

    Returns:
      Exit status: 0 when it is complete, 75 when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend.
    """
    return importlib.import_module(module_of(config)).run(config)
