"""Train what a config describes: one stage, a pipeline of several, or a study of many runs.

    python -m jaxrm.train --config=configs/quickstart.py --config.seed=1

The fields of a pipeline's stage have its name in front: --config.sft.optimizer.lr=1e-4. "--config.*.lora.rank=8" sets
a field of all stages that have it. --config.stages=sft,pairs runs some of the stages. Runs that are done are not
repeated.

--dry_run does all the checks and nothing else: what was read and dropped, examples with the tokens that are trained on,
steps, memory, what is missing for later stages. --html=FILE writes the same as a page.

On several hosts, start the same command on each. SLURM steps and GKE are recognized, and launch/ starts TPU VM pods.
Elsewhere give --coordinator=HOST:PORT --num_processes=N --process_id=I, where HOST is that of process 0.

Exit status: 0 done; 1 some runs of a study failed; 2 invalid input, explained in one line; 74 the disk refused a file,
and one line says what is saved; 75 stopped (SIGTERM, Ctrl-C) and nothing lost: the same command continues; 76 another
process of the job was lost: start all of them again; 77 another launch took the folder over, since this process gave no
sign of life; 130 Ctrl-C twice.
"""

import os
import sys
from pathlib import Path

from jaxrm.runtime import preemption

if __name__ == "__main__":
    preemption.leave_on_signals()  # before the imports below, which take seconds

from absl import flags

from jaxrm.config import command_line, dicts
from jaxrm.config.quiet import silence_libraries
from jaxrm.errors import UserError
from jaxrm.pipeline.config import Pipeline
from jaxrm.runtime import processes
from jaxrm.stage_config import StageConfig
from jaxrm.study.config import Study

CONFIG_CLASSES = (StageConfig, Pipeline, Study)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command: a dry run, and how several processes find each other."""
    flags.DEFINE_boolean("dry_run", False, "check and show what would be done, and do nothing", flag_values=values)
    flags.DEFINE_string("html", None, "write the dry run to this page too", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of process 0, for a job of several", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many processes the job has", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values)
    flags.DEFINE_integer("start_timeout", 300, "seconds to wait for the others", flag_values=values)


def main(config: StageConfig | Pipeline | Study, given: flags.FlagValues | None) -> int:
    """Join the other processes of the job, if there are any, and run what the config describes.

    Args:
      config: of a stage, a pipeline or a study.
      given: the flags of `define_flags`; None runs in this process alone.
    """
    return preemption.run_preemptible(lambda: _join_and_run(config, given), lambda: _what_a_stop_means(config.run_dir))


def _what_a_stop_means(run_dir: str) -> str:
    records = [Path(run_dir).expanduser() / name for name in ("run.json", "pipeline.json", "study.json")]
    if any(record.exists() for record in records):
        return "what was saved stays, and the same command continues"
    return "nothing was written; the same command starts anew"


def _join_and_run(config: StageConfig | Pipeline | Study, given: flags.FlagValues | None) -> int:
    if given is None:
        return run(config)
    if given.dry_run:
        return dry_run(config, given.html)
    if given.html is not None:
        raise UserError(f"--html is {given.html!r}, but only a dry run writes a page here; add --dry_run")
    joined = processes.find_processes(given.coordinator, given.num_processes, given.process_id, os.environ)
    if joined is None:
        return run(config)
    if isinstance(config, Study):
        raise UserError("a study runs in one process, which starts a worker a core; start it once, on one host")
    processes.start(joined, timeout=given.start_timeout)
    preemption.leave_on_signals(is_alone=False)  # again, since JAX took SIGTERM for itself
    processes.check_agreement(dicts.to_dict(config))
    try:
        return run(config)
    except RuntimeError as error:  # JAX's own errors among them
        processes.leave_if_lost(error)
        raise


def dry_run(config: StageConfig | Pipeline | Study, html: str | None) -> int:
    """Check a config and print what a run would do.

    Args:
      config: of a stage, a pipeline or a study.
      html: file for the same as a page.

    Returns:
      Exit status: 0 where it can run, 2 where a stage of a pipeline cannot.

    Raises:
      UserError: where a single stage cannot run.
    """
    silence_libraries()
    from jaxrm.dry_run.run import check  # here, since modules of stages ask JAX for its devices

    page = None if html is None else command_line.check_output_file("--html", html, "dry_run.html")
    result = check(config)
    print(result)
    if page is not None:
        result.write_html(page)
        print(f"--html: {page}")
    for error in result.errors:
        print(f"jaxrm: error: {error}", file=sys.stderr)
    return 2 if result.errors else 0


def run(config: StageConfig | Pipeline | Study) -> int:
    """Run a stage, a pipeline or a study in this process.

    Returns:
      Exit status: 0 done, 1 some runs of a study failed, 75 asked to stop and saved.

    Raises:
      UserError: for what the user can mend.
    """
    silence_libraries()
    # After `processes.start`, since modules of stages may ask JAX for its devices.
    from jaxrm.stages.table import inspect_stage, run_stage

    if isinstance(config, Pipeline):
        from jaxrm.pipeline.run import run_pipeline

        return run_pipeline(config, run_stage, inspect_stage)
    if isinstance(config, Study):
        from jaxrm.study.run import run_study

        return run_study(config)
    return run_stage(config)


if __name__ == "__main__":
    sys.exit(command_line.run(main, CONFIG_CLASSES, define_flags=define_flags))
