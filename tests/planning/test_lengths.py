"""Plans for the lengths that a user expects."""

import dataclasses

import numpy as np
import pytest
from support.planning import config

from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config.dicts import with_changes
from jaxrm.errors import UserError
from jaxrm.planning import run
from jaxrm.planning.lengths import Lengths, expected_lengths
from jaxrm.planning.programs import stage_programs
from jaxrm.planning.run import PlanOptions
from jaxrm.planning.traffic import traffic
from jaxrm.sharding.mesh import build_mesh

PPO = config("ppo", reward=RewardConfig(kind="soft", model="runs/none"))


def test_what_geometric_lengths_come_to():
    """At most 3 tokens, each the last with a chance of a half: 1, 2 and 3 of them in 1/2, 1/4 and 1/4 of all cases."""
    lengths = Lengths(prompt=5, limit=3, response=2.0)
    assert lengths.longest(1) == 1 / 2 + 2 / 4 + 3 / 4
    assert lengths.longest(2) == 1 * 4 / 16 + 2 * 5 / 16 + 3 * 7 / 16
    assert lengths.tokens_read(1) == 1 / 2 + (1 + 2) / 4 + (1 + 2 + 3) / 4
    assert lengths.tokens_read(2) == 2 / 2 + (2 + 2) / 4 + (2 + 2 + 3) / 4
    assert set(lengths.drawn(50).tolist()) == {1, 2, 3}


def test_lengths_without_a_mean_reach_the_limit():
    lengths = Lengths(prompt=5, limit=4)
    assert lengths.mean == lengths.longest(8) == 4 and np.all(lengths.drawn(3) == 4)
    assert lengths.tokens_read(1) == 1 + 2 + 3 + 4
    assert lengths.decoding_steps(8, 1, 8) == 3 and lengths.decoding_steps(8, 1, 2) == 4 * 3


def test_a_plan_has_packed_rows_and_fewer_steps(here):
    """Rows are packed where the config says so, and rollouts end with their longest response."""
    packed, mesh = with_changes(PPO, {"ppo.packing": True}), build_mesh(PPO.mesh, here.devices)
    lengths = expected_lengths(8, 4, prompt=48, limit=16)
    full, expected = (stage_programs(packed, mesh, each).programs for each in (None, lengths))
    assert [program.name for program in expected] == ["rollout", "log_probs", "scoring", "update"]
    assert full[0].while_trips == 15 and 10 < expected[0].while_trips < 15
    assert full[0].cache_read > 2 * expected[0].cache_read > 0
    assert full[1].arguments[2].packing is None and expected[1].arguments[2].packing.num_rows == 2
    assert expected[3].model_flops < 0.25 * full[3].model_flops
    padded = stage_programs(PPO, mesh, lengths).programs[1]
    assert padded.arguments[2].packing is None and padded.tokens == expected[1].tokens == 16 * 12


def test_the_kernel_of_a_cache_counts_for_what_it_reads():
    hlo = """
HloModule m

ENTRY %main (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  ROOT %k = f32[1000]{0} custom-call(%a), custom_call_target="t", metadata={op_name="f/cached_attention/call"}
}
"""
    assert traffic(hlo).memory == 8000 and traffic(hlo, cache_read=0.25).memory == 2000


@pytest.mark.parametrize(
    ("means", "stages", "words"),
    [
        ({"mean_response": 17.0}, {"": PPO}, "--mean_response is 17; it must be from 1 to the 16 tokens of the config"),
        ({"mean_response": 4.0, "mean_prompt": 0.0}, {"": PPO}, "--mean_prompt is 0; it must be from 1 to the 48"),
        ({"mean_prompt": 4.0}, {"": PPO}, "--mean_prompt needs --mean_response too"),
        ({"mean_response": 4.0}, {"": config()}, "no stage is PPO; leave it out"),
        ({"mean_response": 4.0, "find": True}, {"": PPO}, "leave out --find"),
    ],
)
def test_means_that_make_no_plan_are_refused(means, stages, words):
    with pytest.raises(UserError, match=words):
        run.run(stages, dataclasses.replace(PlanOptions("plan", "cpu:8"), **means))
