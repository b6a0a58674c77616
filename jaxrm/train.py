"""Train what a config describes: one stage, a pipeline of several, or a study of many runs.

    python -m jaxrm.train --config=configs/quickstart.py --config.seed=1

A stage of a pipeline has its fields under its name: --config.sft.optimizer.lr=1e-4. --config.stages=sft,pairs runs
some of the stages. What is done is not run again.

Exit status: 0 done; 1 some runs of a study failed; 2 something to mend, said in one line; 75 asked to stop (SIGTERM,
Ctrl-C) and saved: the same command continues.
"""

import sys

from absl import flags
from ml_collections import ConfigDict

from jaxrm import command_line, pipeline, study
from jaxrm.experiment import Experiment
from jaxrm.stages.run import run_stage


def main(config: Experiment | pipeline.Pipeline | study.Study, _: flags.FlagValues) -> int:
    """Run the stage, the stages or the study that the config describes."""
    if isinstance(config, pipeline.Pipeline):
        from jaxrm.stages import pipeline as stages

        return stages.run(config, run_stage)
    if isinstance(config, study.Study):
        from jaxrm.stages import study as studies

        return studies.run(config)
    return run_stage(config)


def config_class(config: ConfigDict) -> type:
    """The class of what a config file gave: a study, a pipeline or a single stage."""
    return study.Study if "worlds" in config else pipeline.config_class(config)


if __name__ == "__main__":
    sys.exit(command_line.run(main, Experiment, config_class_of=config_class))
