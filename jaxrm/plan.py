"""Compile what a config would run for devices that are not there, and say whether it fits and what it costs.

    python -m jaxrm.plan --config=configs/rm_seq2seq_gemma_2b.py --topology=v5e:4x4 --model=gemma-2b
    python -m jaxrm.plan --config=configs/ppo_gemma_2b.py --topology=v5p:4x4x4 --model=gemma-2b --html=plan.html
    python -m jaxrm.plan --config=configs/rm_seq2seq_llama_2_7b.py --topology=h100:8 --model=llama-2-7b --find

No device and no weights are needed: every program of the stage is compiled with abstract arrays. TPU topologies need
the compiler that comes with pip install 'jax[tpu]'; GPUs (h100:8, or h100:2x8 for two hosts) that of 'jax[cuda13]', but
no driver; cpu:8 needs nothing. Of a pipeline every stage that trains is planned.

Where a config does not fit, changes to it are compiled, the mildest first, until one does; the last are adapters (LoRA)
on a frozen base. --find compiles the most promising meshes and names the fastest that fits. --weak_scaling
--topology=v5e:2x4,v5e:4x4,v5e:4x8 compares topologies on which every device has the same work. jaxrm/planning/README.md
says how to read the figures.

Exit status: 0 it fits, or --find found one that does; 1 it does not; 2 invalid input, with a one-line message.
"""

import shlex
import sys

from jaxrm.runtime import preemption

if __name__ == "__main__":
    preemption.say_interrupted()  # before the imports below

from absl import flags

from jaxrm.config import command_line
from jaxrm.errors import UserError, option
from jaxrm.pipeline.config import Pipeline
from jaxrm.stage_config import StageConfig

CONFIG_CLASSES = (StageConfig, Pipeline)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    topology = "required: devices to compile for, e.g. v5e:4x4, v5e:16x16:2 (two slices), h100:2x8 or cpu:8"
    flags.DEFINE_string("topology", None, topology, flag_values=values)
    scaling = "compare several topologies, with commas; the batch grows with their devices"
    flags.DEFINE_boolean("weak_scaling", False, scaling, flag_values=values)
    model = f"shape of the model, by a public name such as gemma-2b, where {option('model.path')} cannot be read here"
    flags.DEFINE_string("model", None, model, flag_values=values)
    flags.DEFINE_boolean("find", False, "search for the fastest mesh and number of microbatches", flag_values=values)
    flags.DEFINE_integer("tries", 8, "most changes that a search compiles", flag_values=values)
    response = "tokens of a response in PPO that you expect in the mean: a second plan beside that of the longest"
    flags.DEFINE_float("mean_response", None, response, flag_values=values)
    flags.DEFINE_float("mean_prompt", None, "the same of a prompt; without it the longest", flag_values=values)
    flags.DEFINE_string("json", None, "file for the figures", flag_values=values)
    flags.DEFINE_string("html", None, "file for a page with the figures as bars and tables", flag_values=values)


def main(config: StageConfig | Pipeline, given: flags.FlagValues) -> int:
    """Print the plan; exit status 1 where a program does not fit."""
    if given.topology is None:
        raise UserError("--topology is required: the devices to compile for, e.g. --topology=v5e:4x4")
    if given.tries < 1:
        raise UserError("--tries", str(given.tries), "at least 1", "--tries=8")
    files = {
        name: command_line.check_output_file(f"--{name}", path, f"plan.{name}")
        for name, path in (("json", given.json), ("html", given.html))
        if path is not None
    }
    from jaxrm.planning.run import PlanOptions, run  # after the checks, since it takes seconds to import
    from jaxrm.planning.stages import planned_stages

    command = shlex.join(["python", "-m", "jaxrm.plan", *sys.argv[1:]])
    means = given.mean_prompt, given.mean_response
    search_options = given.topology, given.weak_scaling, given.find, given.tries
    options = PlanOptions(command, *search_options, *means, files.get("json"), files.get("html"))
    return run(planned_stages(config, given.model), options)


if __name__ == "__main__":
    sys.exit(command_line.run(main, CONFIG_CLASSES, define_flags=define_flags))
