"""Train what a config describes: one stage, or a pipeline of several.

    python -m jaxrm.train --config=configs/quickstart.py --config.seed=1

A stage of a pipeline has its fields under its name: --config.sft.optimizer.lr=1e-4. --config.stages=sft,pairs runs
some of the stages. What is done is not run again.

Exit status: 0 done; 2 something to mend, said in one line; 75 asked to stop (SIGTERM, Ctrl-C) and saved: the same
command continues.
"""

import sys

from absl import flags

from jaxrm import command_line, pipeline
from jaxrm.experiment import Experiment


def main(config: Experiment | pipeline.Pipeline, _: flags.FlagValues) -> int:
    """Run the stage, or the stages, that the config describes."""
    if isinstance(config, pipeline.Pipeline):
        from jaxrm.stages import pipeline as stages

        return stages.run(config, run_stage)
    return run_stage(config)


def run_stage(config: Experiment) -> int:
    """Run one stage, by the name of its algorithm; returns the exit status."""
    if config.algorithm == "sft":
        from jaxrm.stages import sft

        return sft.run(config)
    if config.algorithm == "sample_pairs":
        from jaxrm.stages import sample_pairs

        return sample_pairs.run(config)
    if config.algorithm in ("seq2seq_rm", "scalar_rm"):
        from jaxrm.stages import reward_model

        return reward_model.run(config)
    if config.algorithm == "ppo":
        from jaxrm.stages import ppo

        return ppo.run(config)
    raise AssertionError(config.algorithm)  # Experiment refuses other names


if __name__ == "__main__":
    sys.exit(command_line.run(main, Experiment, config_class_of=pipeline.config_class))
