"""Compile what a config would run for devices that are not there, and say whether it fits and what it costs.

    python -m jaxrm.plan --config=configs/rm_seq2seq_gemma_2b.py --topology=v5e:4x4 --model=gemma-2b
    python -m jaxrm.plan --config=configs/ppo_gemma_2b.py --topology=v5p:4x4x4 --model=gemma-2b --html=plan.html
    python -m jaxrm.plan --config=configs/rm_seq2seq_llama_2_7b.py --topology=h100:8 --model=llama-2-7b --find

No device and no weights are needed: every program of the stage is compiled with abstract arrays. TPU topologies need
the compiler that comes with pip install 'jax[tpu]'; GPUs (h100:8, or h100:2x8 for two hosts) that of 'jax[cuda13]', but
no driver; cpu:8 needs nothing. Of a pipeline every stage that trains is planned.

Where a config does not fit, changes to it are compiled, the mildest first, until one does. --find compiles the most
promising meshes and names the fastest that fits. --weak_scaling --topology=v5e:2x4,v5e:4x4,v5e:4x8 compares topologies
on which every device has the same work.

Exit status: 0 it fits, or --find found one that does; 1 it does not; 2 something to mend, said in one line.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from jaxrm.config import command_line
from jaxrm.errors import UserError, option
from jaxrm.experiment import Experiment
from jaxrm.pipeline import config as pipeline

if TYPE_CHECKING:
    from jaxrm.planning.cost import Plan
    from jaxrm.planning.search import Try
    from jaxrm.planning.topology import Topology

CONFIG_CLASSES = (Experiment, pipeline.Pipeline)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    where = "required: devices to compile for, e.g. v5e:4x4, v5e:16x16:2 (two slices), h100:2x8 or cpu:8"
    flags.DEFINE_string("topology", None, where, flag_values=values)
    several = "the topologies are several, with commas; the batch grows with their devices"
    flags.DEFINE_boolean("weak_scaling", False, several, flag_values=values)
    model = f"shape of the model, by a public name such as gemma-2b, where {option('model.path')} cannot be read here"
    flags.DEFINE_string("model", None, model, flag_values=values)
    flags.DEFINE_boolean("find", False, "look for the mesh and microbatches that are fastest", flag_values=values)
    flags.DEFINE_integer("tries", 8, "changes to compile at most where one is looked for", flag_values=values)
    flags.DEFINE_string("json", None, "file to write the figures to", flag_values=values)
    flags.DEFINE_string("html", None, "file to draw them in", flag_values=values)


def main(config: Experiment | pipeline.Pipeline, given: flags.FlagValues) -> int:
    """Print the plan; exit status 1 where a program does not fit."""
    if given.topology is None:
        raise UserError("--topology is required: the devices to compile for, e.g. --topology=v5e:4x4")
    if given.tries < 1:
        raise UserError(f"--tries is {given.tries}; required at least 1, e.g. --tries=8")
    outputs = {
        flag: command_line.check_output_file(f"--{flag}", path, f"plan.{flag}")
        for flag, path in (("json", given.json), ("html", given.html))
        if path is not None
    }
    from jaxrm import atomic
    from jaxrm.planning import report as plan_report
    from jaxrm.planning.topology import open_topology

    stages = stages_of(config, given.model)
    if given.weak_scaling:
        return _scaled(stages, [open_topology(name) for name in given.topology.split(",")], outputs)
    topology = open_topology(given.topology)
    found = {name: _planned(name, stage, topology, given) for name, stage in stages.items()}
    if "json" in outputs:
        shown = {
            name: plan.as_json() | {"tried": [{"change": each.change, "fits": each.plan.fits} for each in tries]}
            for name, (plan, tries) in found.items()
        }
        atomic.write_json(outputs["json"], shown if len(shown) > 1 else next(iter(shown.values())))
    if "html" in outputs:
        plan_report.write_page(outputs["html"], found, _typed())
    print("", *plan_report.ASSUMPTIONS, sep="\n")
    for flag, path in outputs.items():
        print(f"--{flag}: {path}")
    return 0 if all(_is_good(plan, tries, given.find) for plan, tries in found.values()) else 1


def _is_good(plan: "Plan", tries: list["Try"], find: bool) -> bool:
    """Whether a stage fits as it is, or where others were looked for, any does."""
    return any(each.plan.fits for each in tries) if find else plan.fits and not tries


def _planned(
    name: str, config: Experiment, topology: "Topology", given: flags.FlagValues
) -> tuple["Plan", list["Try"]]:
    """Plan a stage, tell it, and look for a better one where that is asked for or needed.

    Returns:
      Its plan, that of the first try that fits where the stage cannot be laid over the devices as it is, and the tries.
    """
    from jaxrm.planning import cost as planning
    from jaxrm.planning import report as plan_report
    from jaxrm.planning import search as plan_search

    prefix, shown, problem = f"{option(name)}." if name else "config.", config.logging.progress, None
    plan = None
    try:
        plan = planning.plan_stage(config, topology, show_progress=shown, until_misfit=given.find)
    except UserError as error:
        problem = error
    if plan is not None:
        plan_report.print_plan(plan)
    tries: list[Try] = []
    if given.find:
        tries = plan_search.best_fits(config, topology, most=given.tries, show_progress=shown)
    elif plan is None or not plan.fits:
        tries = plan_search.nearest_fit(config, topology, most=given.tries, show_progress=shown)
    if plan is None and not tries:
        assert problem is not None
        raise problem
    if problem is not None:
        print(f"\nAs it is it cannot be laid over {topology.name}: {problem}")
    if tries:
        plan_report.print_tries(tries, "Tried", prefix=prefix)
        good = [each for each in tries if each.plan.fits]
        if good:
            print(f"Use {good[0].typed(prefix)}: {plan_report.verdict(good[0].plan)}")
        else:
            print(
                f"None of the {len(tries)} tried fits; more devices, a smaller --{prefix}data.batch_size, or --tries=24"
            )
    if plan is None:
        plan = next((each.plan for each in tries if each.plan.fits), tries[0].plan)
        plan_report.print_plan(plan)
    return plan, tries


def _scaled(stages: dict[str, Experiment], topologies: list["Topology"], outputs: dict[str, Path]) -> int:
    """Plan every stage for every topology and compare them."""
    from jaxrm import atomic
    from jaxrm.planning import scaling as plan_scaling

    found = {
        name: plan_scaling.weak_scaling(config, topologies, show_progress=config.logging.progress)
        for name, config in stages.items()
    }
    for plans in found.values():
        plan_scaling.print_scaling(plans)
    if "json" in outputs:
        atomic.write_json(outputs["json"], {name: [p.as_json() for p in plans] for name, plans in found.items()})
    if "html" in outputs:
        plan_scaling.write_page(outputs["html"], found, _typed())
    return 0 if all(plan.fits for plans in found.values() for plan in plans) else 1


def _typed() -> str:
    return shlex.join(["python", "-m", "jaxrm.plan", *sys.argv[1:]])


def stages_of(config: Experiment | pipeline.Pipeline, model: str | None) -> dict[str, Experiment]:
    """The stages to plan by name, with the shape of their models; that of a config of one stage is called ""."""
    if isinstance(config, Experiment):
        return {"": _of_shape(config, model)}
    from jaxrm.planning.programs import PLANNED

    every = {name: stage for name in config.stages if (stage := getattr(config, name)).algorithm in PLANNED}
    if not every:
        raise UserError(f"{option('stages')} has none that can be planned; those are {', '.join(PLANNED)}")
    sources = {name: getattr(config, name).model for name in pipeline.stage_names(config)}
    return {
        name: _of_shape(dataclasses.replace(stage, model=_source(stage, sources)), model)
        for name, stage in every.items()
    }


def _source(stage: Experiment, sources: dict) -> object:
    """The model section of a stage, its path followed from stage to stage to the weights that it begins with."""
    model = stage.model
    while model.path is not None and model.path.startswith(pipeline.PREFIX):
        before = sources[model.path.removeprefix(pipeline.PREFIX)]
        model = dataclasses.replace(stage.model, path=before.path, preset=before.preset)
    return model


def _of_shape(config: Experiment, model: str | None) -> Experiment:
    if model is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=None, preset=model))


if __name__ == "__main__":
    sys.exit(command_line.run(main, CONFIG_CLASSES, define_flags=define_flags))
