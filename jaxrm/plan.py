"""Compile what a config would run for devices that are not there, and say whether it fits and what it costs.

    python -m jaxrm.plan --config=configs/rm_seq2seq_gemma_2b.py --topology=v5e:4x4
    python -m jaxrm.plan --config=configs/ppo_gemma_2b.py --topology=v5p:4x4x4 --json=plan.json

No device and no weights are needed: every program of the stage is compiled with abstract arrays. TPU topologies need
the compiler that comes with pip install 'jax[tpu]'; GPUs (h100:8, or h100:2x8 for two hosts) that of 'jax[cuda13]', but
no driver; cpu:8 needs nothing.
"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from jaxrm import command_line
from jaxrm.errors import UserError
from jaxrm.experiment import Experiment


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string("topology", None, "required: devices to compile for, e.g. v5e:4x4 or cpu:8", flag_values=values)
    model = "shape of the model, by a public name such as gemma-2b, where config.model.path cannot be read here"
    flags.DEFINE_string("model", None, model, flag_values=values)
    flags.DEFINE_string("json", None, "file to write the figures to", flag_values=values)


def main(config: Experiment, given: flags.FlagValues) -> int:
    """Print the plan; exit status 1 where a program does not fit."""
    if given.topology is None:
        raise UserError("--topology is required: the devices to compile for, e.g. --topology=v5e:4x4")
    from jaxrm.runtime.run_folder import write_json_atomically
    from jaxrm.runtime.topology import open_topology
    from jaxrm.stages.planning import planned, print_plan

    if given.model is not None:
        shape = dataclasses.replace(config.model, path=None, preset=given.model)
        config = dataclasses.replace(config, model=shape)
    topology = open_topology(given.topology)
    plan = planned(config, topology, show_progress=config.logging.progress)
    print_plan(plan)
    if given.json is not None:
        write_json_atomically(Path(given.json).expanduser(), plan.as_json())
        print(f"The figures are in {given.json}")
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(command_line.run(main, Experiment, define_flags=define_flags))
