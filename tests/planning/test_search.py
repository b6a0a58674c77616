"""Searching for changes with which a config fits."""

import dataclasses

import numpy as np
from support.planning import config, tpu, with_memory

from jaxrm.planning import search
from jaxrm.planning.compile import plan_stage
from jaxrm.planning.topology import open_topology


def test_the_nearest_change_that_fits_is_more_microbatches(here):
    one = config()
    whole, halves = (
        plan_stage(dataclasses.replace(one, num_microbatches=parts), here).programs[0].peak / 2**30 for parts in (1, 2)
    )
    assert halves < whole
    trials = search.nearest_fit(one, with_memory(here, (whole + halves) / 2), most=4)
    assert [each.changes for each in trials] == [{"num_microbatches": 2}] and trials[0].plan.fits
    assert trials[0].as_flags() == "--config.num_microbatches=2"


def test_where_even_the_state_is_too_large_nothing_is_compiled(here):
    assert search.nearest_fit(config(), with_memory(here, 1e-6), most=4) == []


@tpu
def test_a_search_ranks_the_fastest_that_fits_first():
    """What does not fit comes last."""
    topology = open_topology("v5e:2x2")
    trials = search.best_fits(config(), topology, most=3)
    assert len(trials) == 3 and all(each.plan.fits for each in trials)
    assert [each.plan.seconds[1] for each in trials] == sorted(each.plan.seconds[1] for each in trials)
    meshes = [tuple(each.plan.mesh.values()) for each in trials]
    assert len(set(meshes)) == 3 and all(np.prod(mesh) == 4 for mesh in meshes)
    tight = dataclasses.replace(
        topology, chip=dataclasses.replace(topology.chip, memory=trials[0].plan.fullest / 2**30)
    )
    again = search.best_fits(config(), tight, most=3)
    fits = [each.plan.fits for each in again]
    assert True in fits and False in fits and fits == sorted(fits, reverse=True)
