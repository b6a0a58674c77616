"""Train what a config describes: one stage, a pipeline of several, or a study of many runs.

    python -m jaxrm.train --config=configs/quickstart.py --config.seed=1

A stage of a pipeline has its fields under its name: --config.sft.optimizer.lr=1e-4. --config.stages=sft,pairs runs
some of the stages. What is done is not run again.

On several hosts the same command is started on each. SLURM steps and GKE are recognized, launch/ starts TPU VM pods;
elsewhere say --coordinator=HOST:PORT --num_processes=N --process_id=I, HOST being that of process 0.

Exit status: 0 done; 1 some runs of a study failed; 2 something to mend, said in one line; 75 asked to stop (SIGTERM,
Ctrl-C) and saved: the same command continues; 76 another process of the job was lost: start all of them again.
"""

import os
import sys

from absl import flags

from jaxrm.config import command_line, dicts
from jaxrm.errors import UserError
from jaxrm.experiment import Experiment
from jaxrm.pipeline import config as pipeline
from jaxrm.runtime import processes
from jaxrm.study import config as study

CONFIG_CLASSES = (Experiment, pipeline.Pipeline, study.Study)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command: how several processes find each other."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, for a job of several", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many processes the job has", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values)
    flags.DEFINE_integer("start_timeout", 300, "seconds to wait for the others", flag_values=values)


def main(config: Experiment | pipeline.Pipeline | study.Study, given: flags.FlagValues | None) -> int:
    """Join the other processes, if there are any, and run what the config describes; None is for this process alone."""
    if given is None:
        return _run(config)
    joined = processes.find_processes(given.coordinator, given.num_processes, given.process_id, os.environ)
    if joined is None:
        return _run(config)
    if isinstance(config, study.Study):
        raise UserError("a study runs in one process, which starts a worker a core; start it once, without others")
    processes.start(joined, timeout=given.start_timeout)
    processes.check_agreement(dicts.to_dict(config))
    try:
        return _run(config)
    except RuntimeError as error:  # JAX's own errors among them
        processes.leave_if_lost(error)
        raise


def _run(config: Experiment | pipeline.Pipeline | study.Study) -> int:
    from jaxrm.stages.table import run_stage  # modules of stages may ask JAX for its devices

    if isinstance(config, pipeline.Pipeline):
        from jaxrm.pipeline import run as stages

        return stages.run(config, run_stage)
    if isinstance(config, study.Study):
        from jaxrm.study import run as studies

        return studies.run(config)
    return run_stage(config)


if __name__ == "__main__":
    sys.exit(command_line.run(main, CONFIG_CLASSES, define_flags=define_flags))
