"""Rollouts whose log-probs are not those of training: measured, weighed in the loss, and bounded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ppo import B, Setup, T, batch_of, experiment, fit, pattern_reward

from jaxrm.algorithms import ppo_loss
from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.errors import UserError
from jaxrm.ops import losses
from jaxrm.ops.vocab import TokenStatistics
from jaxrm.types import Rollout

INT8 = {"weights": "int8", "cache": "int8"}


def test_importance_weights_are_those_of_a_plain_loop():
    """The policy's loss is weighed token by token; what stands outside of the mask does not count."""
    rng, batch = np.random.default_rng(0), batch_of()
    mask = np.asarray(batch.response_mask)
    now, old, sampler = (-np.abs(rng.normal(size=(B, T))) for _ in range(3))
    advantages = rng.normal(size=(B, T))
    config = PPOConfig(importance_cap=1.5)
    masked = [jnp.asarray(np.where(mask, x, 0.0), jnp.float32) for x in (now, old, sampler, advantages)]
    zeros = jnp.zeros((B, T))
    token = TokenStatistics(*(masked[0] if name == "log_probs" else zeros for name in TokenStatistics._fields))
    rollout = Rollout(batch, masked[1], zeros, None, masked[3], None, masked[2])
    (total, tokens), aux = ppo_loss.policy_terms(token, rollout, config)
    expected, weights = 0.0, []
    for row, t in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(now[row, t] - old[row, t])
        clipped = min(max(ratio, 1 - config.clip), 1 + config.clip)
        weights.append(min(np.exp(old[row, t] - sampler[row, t]), 1.5))
        expected -= weights[-1] * min(ratio * advantages[row, t], clipped * advantages[row, t])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(aux["importance_weight"][0] / tokens, np.mean(weights), rtol=1e-5)
    assert float(aux["importance_capped"][0]) == np.sum(np.equal(weights, 1.5)) > 0


def test_importance_weights_have_no_gradient_and_no_overflow():
    def weight(old):
        return jnp.sum(losses.importance_weights(old, jnp.asarray([-1000.0, -1.0]), 2.0))

    value, gradient = jax.value_and_grad(weight)(jnp.asarray([-1.0, -1.0]))
    assert float(value) == 3.0 and not np.any(gradient)


def test_a_sampler_too_far_from_training_stops_the_run(tmp_path):
    """After the step, whose state is saved; the message says what to type."""
    s = Setup(experiment(rollout={**INT8, "max_mismatch": 1e-7}), reward=pattern_reward)
    with pytest.raises(
        UserError, match=r"step 1: .*--config\.rollout\.weights=compute --config\.rollout\.cache=compute or"
    ):
        fit(s, tmp_path, num_steps=3)
    assert [int(folder.name) for folder in tmp_path.iterdir() if folder.name.isdigit()] == [1]


@pytest.mark.slow
def test_int8_rollouts_learn_a_pattern(tmp_path):
    """With importance weights. The update's ratio is 1 at first, since it is of the training forward alone.

    Three of the four are one token. Without a KL a policy may stay at writing it four times, 0.75.
    """
    options = {"num_epochs": 2, "num_minibatches": 4, "kl_coef": 0.03, "whiten_advantages": True}
    config = experiment(
        num_steps=100, batch_size=64, new_tokens=4, lr=5e-3, rollout=INT8, importance_cap=2.0, **options
    )
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, schedule="linear"),
        ppo=dataclasses.replace(config.ppo, missing_end_penalty=0.0),  # a pattern has no end
    )
    s = Setup(config, reward=pattern_reward)
    _, finished, recorded, _ = fit(s, tmp_path, num_steps=100)
    rewards = [row["reward_uncalibrated"] for row in recorded.steps]
    assert finished and rewards[0] < 0.2 and np.mean(rewards[-3:]) >= 0.9, rewards[::10]
    assert all(row["ratio_error/first"] < 1e-5 for row in recorded.steps)
    assert all(1e-5 < row["sampler_mismatch"] < 0.1 for row in recorded.steps[:20])
    assert all(abs(row["importance_weight"] - 1) < 0.05 for row in recorded.steps)
