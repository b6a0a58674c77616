"""Plan every stage, search where that is asked for or needed, print the figures and write them to files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrm import atomic
from jaxrm.errors import UserError, flag
from jaxrm.planning import report, scaling, search
from jaxrm.planning.compile import plan_stage
from jaxrm.planning.cost import StagePlan
from jaxrm.planning.lengths import Lengths, expected_lengths
from jaxrm.planning.search import Trial
from jaxrm.planning.topology import Topology, open_topology
from jaxrm.stage_config import PPO, TrainingConfig


@dataclass(frozen=True)
class PlanOptions:
    """What to plan for and what to write.

    Attributes:
      command: the command line, for the page.
      topology: name of the devices; several with commas for weak scaling.
      weak_scaling: compare topologies with the same work for each device.
      find: search for the fastest mesh and number of microbatches.
      tries: most changes that a search compiles.
      mean_prompt: tokens of a prompt in PPO that are expected in the mean; None for the longest.
      mean_response: of a response; None for no plan of expected lengths.
      json: file for the figures.
      html: file for the page.
    """

    command: str
    topology: str
    weak_scaling: bool = False
    find: bool = False
    tries: int = 8
    mean_prompt: float | None = None
    mean_response: float | None = None
    json: Path | None = None
    html: Path | None = None


def run(stages: Mapping[str, TrainingConfig], options: PlanOptions) -> int:
    """Plan stages, by name.

    Returns:
      Exit status: 0 where everything fits, or a search found what does; else 1.
    """
    lengths = _lengths_of(stages, options)
    if options.weak_scaling:
        return _compare_topologies(stages, options)
    topology = open_topology(options.topology)
    plans: dict[str, tuple[StagePlan, list[Trial]]] = {}
    for name, config in stages.items():
        with report.stage_naming(name):
            plans[name] = _plan_and_print(config, topology, options, lengths.get(name))
    if options.json is not None:
        figures = {
            name: plan.as_json() | {"tried": [{"change": each.changes, "fits": each.plan.fits} for each in trials]}
            for name, (plan, trials) in plans.items()
        }
        atomic.write_json(options.json, figures if len(figures) > 1 else next(iter(figures.values())))
    if options.html is not None:
        report.write_page(options.html, plans, options.command)
    print("", *report.ASSUMPTIONS, sep="\n")
    for name, path in (("json", options.json), ("html", options.html)):
        if path is not None:
            print(f"--{name}: {path}")
    return 0 if all(_is_success(plan, trials, options.find) for plan, trials in plans.values()) else 1


def _is_success(plan: StagePlan, trials: list[Trial], find: bool) -> bool:
    """Whether a stage fits as written; with ``find``, whether any trial does."""
    return any(each.plan.fits for each in trials) if find else plan.fits and not trials


def _lengths_of(stages: Mapping[str, TrainingConfig], options: PlanOptions) -> dict[str, Lengths]:
    """The lengths that are expected in each stage of PPO, where they are given.

    Raises:
      UserError: where no stage has any, or a search or a comparison is asked for too.
    """
    if options.mean_response is None:
        if options.mean_prompt is not None:
            raise UserError("--mean_prompt needs --mean_response too, the mean tokens of a response")
        return {}
    expected = {}
    for name, config in stages.items():
        if isinstance(config, PPO):
            limit = config.rollout.sampling.max_new_tokens
            prompt = config.data.max_length - limit
            expected[name] = expected_lengths(options.mean_prompt, options.mean_response, prompt, limit)
    if not expected:
        raise UserError("--mean_response is of responses in PPO, but no stage is PPO; leave it out")
    if options.weak_scaling or options.find:
        other = "--weak_scaling" if options.weak_scaling else "--find"
        raise UserError(f"--mean_response is of one config and topology; leave out {other}")
    return expected


def _plan_and_print(
    config: TrainingConfig, topology: Topology, options: PlanOptions, lengths: Lengths | None
) -> tuple[StagePlan, list[Trial]]:
    """Plan a stage, and search for a better config where that is asked for or needed.

    Returns:
      Its plan, for ``lengths`` where they are given and it fits, and the trials. Where the config does not fit the
      mesh, the plan is that of the first trial that fits.

    Raises:
      UserError: the config does not fit the mesh, and there is no other to try.
    """
    progress = config.logging.progress
    compiled: dict[str, Any] = {}
    plan, problem = _plan_as_written(config, topology, until_misfit=options.find, compiled=compiled)
    if plan is not None and plan.fits and lengths is not None:
        plan = plan_stage(config, topology, lengths=lengths, compiled=compiled)
        report.print_plan(plan)
    trials: list[Trial] = []
    if options.find:
        trials = search.best_fits(config, topology, most=options.tries, show_progress=progress)
    elif plan is None or not plan.fits:
        trials = search.nearest_fit(config, topology, most=options.tries, show_progress=progress)
    if problem is not None:
        if not trials:
            raise problem
        print(f"\nThe config does not fit {topology.name} as written: {problem}")
    if trials:
        _print_search(trials)
    if plan is None:
        plan = next((each.plan for each in trials if each.plan.fits), trials[0].plan)
        report.print_plan(plan)
    if note := report.critic_note(plan):
        print(note)
    return plan, trials


def _plan_as_written(
    config: TrainingConfig, topology: Topology, *, until_misfit: bool, compiled: dict[str, Any]
) -> tuple[StagePlan | None, UserError | None]:
    """The plan of a config, printed; or why it does not fit the mesh."""
    try:
        plan = plan_stage(
            config, topology, compiled=compiled, show_progress=config.logging.progress, until_misfit=until_misfit
        )
    except UserError as error:
        return None, error
    report.print_plan(plan)
    return plan, None


def _print_search(trials: list[Trial]) -> None:
    report.print_trials(trials, "Tried")
    best = next((each for each in trials if each.plan.fits), None)
    if best is not None:
        print(f"Use {best.as_flags()}: {report.verdict(best.plan)}")
        if "lora.rank" in best.changes:
            print("That trains adapters (LoRA) on frozen weights, usually at about ten times the learning rate.")
    else:
        print(
            f"None of the {len(trials)} tried fits; use more devices, a smaller {flag('data.batch_size')}, "
            "or --tries=24"
        )


def _compare_topologies(stages: Mapping[str, TrainingConfig], options: PlanOptions) -> int:
    """Plan every stage for every topology, with the same work for each device."""
    topologies = [open_topology(name) for name in options.topology.split(",")]
    plans: dict[str, list[StagePlan]] = {}
    for name, config in stages.items():
        with report.stage_naming(name):
            plans[name] = scaling.weak_scaling(config, topologies, show_progress=config.logging.progress)
    for each in plans.values():
        scaling.print_scaling(each)
    if options.json is not None:
        atomic.write_json(options.json, {name: [plan.as_json() for plan in each] for name, each in plans.items()})
    if options.html is not None:
        scaling.write_page(options.html, plans, options.command)
    return 0 if all(plan.fits for each in plans.values() for plan in each) else 1
