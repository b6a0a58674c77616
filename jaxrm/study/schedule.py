"""The runs of a study in order, all known beforehand but for the answers of best checkpoints."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from jaxrm.study.arms import read_arm
from jaxrm.study.config import BEST, Setting, Study, settings
from jaxrm.study.run_configs import (
    Site,
    StudyRun,
    answers_name,
    arm_runs,
    best_run,
    mechanism_runs,
    policy_name,
    shared_runs,
)
from jaxrm.study.worlds import worlds_of


class Best(NamedTuple):
    """The checkpoint of a training run with the highest judge score on the selection prompts.

    Attributes:
      judge: its score.
      step: of the checkpoint.
      is_last: whether it is the last one, whose answers are there anyway.
    """

    judge: float
    step: int
    is_last: bool


class Schedule:
    """The runs of a study, each after those that it needs.

    Args:
      study: from `jaxrm.study.presets.apply_preset`.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        # Seeds outside, worlds inside, so that a study that is stopped early has every world alike.
        sites = itertools.product(study.seeds or (), worlds_of(study))
        listed: set[str] = set()
        self._runs: dict[Site, list[StudyRun]] = {}
        for seed, world in sites:
            site = Site(study, world, seed)
            runs = {run.name: run for run in _site_runs(site) if run.name not in listed}
            listed |= runs.keys()
            self._runs[site] = list(runs.values())
        self._best: dict[tuple[str, Best], StudyRun] = {}

    def runs(self, best: Mapping[str, Best]) -> list[StudyRun]:
        """List the runs.

        Args:
          best: the best checkpoint of each run of reinforcement learning that is done, by name. Once all settings of
            an arm and seed are there, the best of their checkpoints answers too.
        """
        listed: list[StudyRun] = []
        for site, runs in self._runs.items():
            listed += runs
            for arm in self._study.arms or ():
                setting = best_setting(self._study, site.world, site.seed, arm, best)
                if setting is None:
                    continue
                name = policy_name(site.world, site.seed, arm, setting)
                checkpoint = best[name]
                if not checkpoint.is_last:
                    place = (name, checkpoint)
                    if place not in self._best:
                        self._best[place] = best_run(site, arm, setting, checkpoint.step)
                    listed.append(self._best[place])
        return listed


def best_setting(study: Study, world: str, seed: int, arm: str, best: Mapping[str, Best]) -> Setting | None:
    """The setting that holds the best checkpoint of an arm and seed; None while one of its runs is not done."""
    names = {setting: policy_name(world, seed, arm, setting) for setting in settings(study, arm)}
    if read_arm(arm) is None or any(name not in best for name in names.values()):
        return None
    return max(names, key=lambda setting: best[names[setting]].judge)


def unknown_answers(study: Study, best: Mapping[str, Best]) -> dict[str, list[str]]:
    """Runs that a `Schedule` does not list yet: answers of best checkpoints that are still to be found.

    Returns:
      The names of the runs that each needs, which are those of all settings, by its own name.
    """
    unknown = {}
    for seed, world, arm in itertools.product(study.seeds or (), worlds_of(study), study.arms or ()):
        if read_arm(arm) is not None:
            policies = [policy_name(world, seed, arm, setting) for setting in settings(study, arm)]
            if not best.keys() >= set(policies):
                unknown[answers_name(world, seed, arm, BEST)] = policies
    return unknown


def _site_runs(site: Site) -> list[StudyRun]:
    """The runs of a world and seed that are known beforehand; some more than once."""
    runs = shared_runs(site)
    for arm in site.study.arms or ():
        for setting in settings(site.study, arm):
            runs += arm_runs(site, arm, setting)
    return [*runs, *mechanism_runs(site)]
