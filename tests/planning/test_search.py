"""Searching for changes with which a config fits."""

import dataclasses
import math

import pytest
from support.planning import config, tpu, with_memory

from jaxrm.planning import search
from jaxrm.planning.compile import plan_stage
from jaxrm.planning.topology import open_topology


@pytest.mark.slow
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


def trial(plan, seconds, *, fits):
    program = dataclasses.replace(plan.programs[0], fits=fits, decode=None)
    cost = dataclasses.replace(program.cost, compute_seconds=seconds, memory_seconds=0.0, ici_seconds=0.0)
    return search.Trial({}, dataclasses.replace(plan, programs=(dataclasses.replace(program, cost=cost),)))


def test_trials_that_fit_rank_first_by_their_time(here):
    plan = plan_stage(config(), here)
    slow, fast, misfit = trial(plan, 2.0, fits=True), trial(plan, 1.0, fits=True), trial(plan, 0.5, fits=False)
    assert search.rank([misfit, slow, fast]) == [fast, slow, misfit]


@tpu
@pytest.mark.slow
def test_a_search_compiles_different_meshes_of_all_devices():
    trials = search.best_fits(config(), open_topology("v5e:2x2"), most=2)
    assert len(trials) == 2 and all(each.plan.fits for each in trials) and search.rank(trials) == trials
    meshes = [tuple(each.plan.mesh.values()) for each in trials]
    assert len(set(meshes)) == 2 and all(math.prod(mesh) == 4 for mesh in meshes)
