"""Prompts with their responses in shared rows, against rows of their own."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import optax
import pytest
from support.ppo import (
    EIGHT,
    KEY,
    ONE,
    Rows,
    Setup,
    batch_of,
    data_of,
    experiment,
    fit,
    pattern_reward,
    ptx_rows,
    rewarded,
)

from jaxrm.algorithms import ppo_loss, row_packing
from jaxrm.algorithms.ppo_state import PPOBatch
from jaxrm.models import lora
from jaxrm.models.lora import NO_LORA, LoRAConfig
from jaxrm.runtime.metrics import WALL_CLOCK
from jaxrm.stages.ppo.checkpoints import restore

LONG = 24  # tokens of a response; their ends are drawn, so most are shorter
# options, adapters, whether SFT rows are mixed in, devices
CASES = {
    "one pass": ({"whiten_advantages": True}, NO_LORA, False, ONE),
    "shared trunk": ({"shared_trunk": True, "num_minibatches": 2}, LoRAConfig(rank=2), True, ONE),
    "two passes, eight devices": ({"parts": 2, "kl_loss_coef": 0.1}, NO_LORA, False, EIGHT),
    "grpo, eight devices": ({"advantage": "grpo", "n": 2, "kl_coef": 0.3}, NO_LORA, True, EIGHT),
}


@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (4, 1), (2, 3)])
def test_rows_have_room_and_are_of_one_group(shards, parts):
    """Examples of a group lie apart from each other, each in one row, and the number of rows is of the ladder."""
    rng = np.random.default_rng(shards)
    for _ in range(20):
        lengths, width = rng.integers(1, 40, 48).clip(1, 33), 33
        groups = row_packing.groups_of(48, shards, parts)
        starts, num_rows = row_packing.plan_rows(lengths, groups, width)
        most = groups.shape[1]
        assert num_rows in {int(np.ceil(fraction * most)) for fraction in row_packing.FRACTIONS}
        for group in groups:
            ends = starts[group] + lengths[group]
            assert (starts[group] // width == (ends - 1) // width).all() and ends.max() <= num_rows * width
            order = np.argsort(starts[group])
            assert (ends[order][:-1] <= starts[group][order][1:]).all() and starts[group].min() == 0
    assert sorted(groups.ravel()) == list(range(48))
    by_hand = [row for part in np.arange(48).reshape(shards, -1) for row in part[::parts]]
    assert groups[::parts].ravel().tolist() == by_hand  # of the first microbatch, as `microbatches.split` cuts


@functools.cache
def setup(case):
    options, adapters, _, mesh = CASES[case]
    return {
        packing: Setup(
            experiment(batch_size=16, new_tokens=LONG, lr=1e-3, packing=packing, **options),
            mesh,
            reward=pattern_reward,
            adapters=adapters,
        )
        for packing in (False, True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_packed_steps_equal_plain_ones(tmp_path, case):
    """To 1e-5 in the first update; Adam makes more of it in parameters whose gradients are rounding."""
    rows, is_one_update = {}, setup(case)[True].learner.updates_per_step == 1
    for packing, s in setup(case).items():
        ptx = ptx_rows(8) if CASES[case][2] else None
        _, finished, recorded, _ = fit(s, tmp_path / str(packing), num_steps=2, state=s.init_state(), ptx=ptx)
        rows[packing] = recorded.steps
        assert finished
    for number, (plain, packed) in enumerate(zip(rows[False], rows[True], strict=True)):
        assert plain.keys() == packed.keys()
        for name in plain.keys() - WALL_CLOCK:
            tolerance = 1e-5 if number == 0 and is_one_update else 1e-4
            near = np.isclose(packed[name], plain[name], rtol=tolerance, atol=max(tolerance, 2e-5))
            assert near, (number, name, packed[name], plain[name])


@pytest.mark.slow
def test_packed_gradients_equal_plain_ones():
    """Of policy and critic, to 1e-5 of their norm (float32), with rows that hold several prompts."""
    s = setup("one pass")[True]
    batch = batch_of(rows=16, width=5, length=LONG)
    packed = s.programs.pack_rows(batch)
    assert packed.packing.num_rows < 16 and packed.packing.num_tokens < 16 * LONG
    token_log_probs = s.log_probs(batch)
    chex.assert_trees_all_close(s.log_probs(packed), token_log_probs, rtol=1e-5, atol=1e-5)
    rewards = rewarded(batch, np.arange(16) / 7)
    rollout, _, _ = s.programs.estimate(s.state.feedback, batch, token_log_probs, rewards)
    frozen = s.networks.frozen(s.base)
    for loss, params, base in (
        (ppo_loss.policy_loss, s.state.policy.params, frozen.policy),
        (ppo_loss.critic_loss, s.state.critic.params, frozen.critic),
    ):
        loss_fn = loss(s.networks, s.config.ppo)
        gradient = jax.jit(
            jax.value_and_grad(lambda p, b, loss_fn=loss_fn, base=base: loss_fn(lora.join(base, p), b, KEY)[0][0])
        )
        plain = gradient(params, PPOBatch(rollout))
        ours = gradient(params, PPOBatch(dataclasses.replace(rollout, responses=packed)))
        difference = jax.tree.map(lambda a, b: a - b, ours[1], plain[1])
        assert optax.tree.norm(difference) / optax.tree.norm(plain[1]) < 1e-5
        assert np.isclose(ours[0], plain[0], rtol=1e-5, atol=2e-5)  # whitened advantages add up to 0


@pytest.mark.slow
def test_a_packed_run_that_goes_on_has_the_same_bits(tmp_path):
    s = setup("one pass")[True]
    whole, _, expected, _ = fit(s, tmp_path / "whole", num_steps=3, state=s.init_state())
    _, _, _, checkpoints = fit(s, tmp_path / "cut", num_steps=1, state=s.init_state())
    rows = Rows(s.config, s.mesh)
    state = restore(s.learner, checkpoints, data_of(rows), KEY)
    checkpoints.close()
    resumed, _, recorded, _ = fit(s, tmp_path / "cut", num_steps=3, state=state, rows=rows)
    assert [row["loss"] for row in recorded.steps] == [row["loss"] for row in expected.steps[1:]]
    chex.assert_trees_all_equal(resumed.policy.params, whole.policy.params)
