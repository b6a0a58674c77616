"""PPO without a critic: what its state holds, what is estimated and minimized, and that it learns."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.ppo import EOS, KEY, B, Setup, T, batch_of, experiment, fit, pattern_reward, ptx_rows, rewarded, stay

from jaxrm.algorithms import ppo, ppo_loss, scoring
from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.ppo_state import PPOBatch, RewardAndKLState
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.algorithms.rollout import TokenLogProbs
from jaxrm.algorithms.train_step import build_train_step
from jaxrm.ops import advantages, kl, losses, reward_scaling
from jaxrm.ops.masking import masked_whiten
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.ops.vocab import TokenStatistics
from jaxrm.stages.ppo.checkpoints import saved_arrays
from jaxrm.types import Rollout

CALIBRATION = reward_scaling.uncalibrated()


@functools.cache
def without_critic(advantage="grpo", **options):
    return Setup(experiment(advantage=advantage, n=2, **options))


def made_up(kind="margin", seed=5):
    """Responses with log-probs of policy and reference, and fractional rewards on their tokens."""
    rng = np.random.default_rng(seed)
    batch = batch_of(seed)
    mask = batch.response_mask
    log_probs, reference, values = (jnp.where(mask, rng.normal(size=(B, T)), 0.0) for _ in range(3))
    if kind == "scalar":
        return batch, TokenLogProbs(log_probs, log_probs, reference, None), rewarded(batch, rng.normal(size=B))
    rewards = scoring.as_token_rewards(CALIBRATION, KINDS[kind], values, mask, batch, (EOS,))
    return batch, TokenLogProbs(log_probs, log_probs, reference, None), rewards


@pytest.mark.parametrize("kind", ["margin", "scalar"])
@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce++"])
def test_advantages_are_of_rewards_less_the_kl(advantage, kind):
    """But for GRPO, whose KL is in the loss; a missing end costs a response its penalty in each."""
    batch, token_log_probs, rewards = made_up(kind)
    config = PPOConfig(advantage=advantage, kl_coef=0.3, reward_clip=2.0)
    groups = ppo.Groups(2, is_terminal=kind == "scalar")
    rollout, feedback, metrics = jax.jit(
        functools.partial(ppo.estimate, config=config, next_calibration=stay, groups=groups)
    )(RewardAndKLState(CALIBRATION, jnp.float32(0.3)), batch, token_log_probs, rewards)
    mask = np.asarray(batch.response_mask)
    shaped = np.asarray(rewards.rewards).copy()
    for row, length in enumerate(mask.sum(axis=1)):
        shaped[row, length - 1] -= int(batch.responses[row, length - 1]) != EOS
    beta = 0.0 if advantage == "grpo" else 0.3
    difference = token_log_probs.log_probs - token_log_probs.reference_log_probs
    shaped = jnp.asarray(np.where(mask, np.clip(shaped - beta * difference, -2.0, 2.0), 0.0), jnp.float32)
    function = getattr(advantages, advantage.replace("++", "_plus_plus"))
    expected = function(shaped, batch.response_mask, group_size=2, is_terminal=groups.is_terminal)
    if advantage == "reinforce++":
        expected = masked_whiten(expected, batch.response_mask)
    np.testing.assert_allclose(rollout.advantages, expected, atol=1e-5)
    assert rollout.values is None and rollout.returns is None and feedback.kl_coef == np.float32(0.3)
    assert not {"value", "explained_variance"} & set(metrics) and metrics["equal_groups"] == 0


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce++"])
def test_groups_of_equal_rewards_are_counted_whatever_their_kl(advantage):
    batch, token_log_probs, _ = made_up()
    config = PPOConfig(advantage=advantage, kl_coef=0.3, missing_end_penalty=0.0)
    estimate = functools.partial(ppo.estimate, config=config, next_calibration=stay)
    feedback, groups = RewardAndKLState(CALIBRATION, jnp.float32(0.3)), ppo.Groups(2, is_terminal=True)
    for reward, share in ((np.full(B, 0.7), 1.0), (np.arange(B) / 7, 0.0)):
        _, _, metrics = estimate(feedback, batch, token_log_probs, rewarded(batch, reward), groups=groups)
        assert metrics["equal_groups"] == share


def test_without_a_critic_no_critic_is_anywhere():
    """Not in the state, the checkpoint, the parameters or the log-probs, and the update has no loss of it."""
    s = without_critic()
    assert s.state.critic is None and s.networks.critic is None and not s.networks.is_shared
    assert set(saved_arrays(s.state, s.networks)) == {"params", "opt_state", "feedback"}
    batch = batch_of()
    token_log_probs = s.log_probs(batch)
    assert token_log_probs.values is None and s.programs.update_critic is None
    rollout, _, _ = s.programs.estimate(s.state.feedback, batch, token_log_probs, rewarded(batch, np.arange(B) / 7))
    state, rows = ppo.update(
        s.programs, s.config.ppo, s.init_state(), s.networks.frozen({}), rollout, KEY, lambda: None
    )
    assert state.critic is None and not any("value" in name or "critic" in name for name in rows[0])
    assert {"policy_loss", "kl_loss", "entropy", "grad_norm"} <= set(rows[0])


@pytest.mark.parametrize("options", [{}, {"kl_loss_estimator": "k2"}], ids=["k3", "k2"])
def test_the_kl_of_grpo_is_a_term_of_its_loss(options):
    batch, token_log_probs, rewards = made_up()
    config = PPOConfig(advantage="grpo", kl_coef=0.3, **options)
    estimate = functools.partial(ppo.estimate, config=config, next_calibration=stay)
    feedback = RewardAndKLState(CALIBRATION, jnp.float32(0.3))
    rollout, _, _ = estimate(feedback, batch, token_log_probs, rewards, groups=ppo.Groups(2))
    s = without_critic()
    (total, weight), aux = jax.jit(ppo_loss.policy_loss(s.networks, config))(s.reference, PPOBatch(rollout), KEY)
    now = s.log_probs(batch).log_probs
    surrogate = losses.clipped_policy_loss(now, rollout.log_probs, rollout.advantages, clip=0.2).loss
    penalty = kl.kl_estimate(options.get("kl_loss_estimator", "k3"), now, rollout.reference_log_probs)
    mask = np.asarray(batch.response_mask)
    assert np.isclose(total / weight, np.asarray(surrogate + 0.3 * penalty)[mask].mean(), rtol=1e-4)
    assert np.isclose(aux["kl_loss"][0] / aux["kl_loss"][1], np.asarray(penalty)[mask].mean(), rtol=1e-4)


@pytest.mark.parametrize("aggregation", ["sequence", "constant"])
def test_an_aggregation_is_the_same_however_the_batch_is_cut(aggregation):
    """One step of plain SGD moves the parameters by the gradient of policy loss + coefficient x SFT mean."""
    s = without_critic()
    config = dataclasses.replace(s.config.ppo, loss_aggregation=aggregation, ptx_coef=0.5, kl_coef=0.2)
    batch, token_log_probs, rewards = made_up()
    estimate = functools.partial(ppo.estimate, config=config, next_calibration=stay)
    rollout, _, _ = estimate(s.state.feedback, batch, token_log_probs, rewards, groups=ppo.Groups(2))
    loss_fn, rows, optimizer = ppo_loss.policy_loss(s.networks, config), s.learner.shardings.policy.step, optax.sgd(1.0)
    weighed = jax.jit(functools.partial(ppo.weigh, aggregation=aggregation))(rollout, ptx_rows())

    def stepped(parts):
        state = s.init_state().policy
        before = jax.tree.map(jnp.copy, state.params)
        sgd = dataclasses.replace(state, opt_state=optimizer.init(state.params))
        sharding = dataclasses.replace(
            s.learner.shardings.policy, opt_state=jax.tree.map(lambda _: rows, sgd.opt_state)
        )
        step = build_train_step(
            loss_fn, optimizer, state_sharding=sharding, batch_sharding=rows, num_microbatches=parts
        )
        moved, metrics = step(sgd, {}, weighed)
        return metrics, jax.tree.map(lambda a, b: a - b, before, moved.params)

    (metrics, whole), (_, in_parts) = stepped(1), stepped(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), in_parts, whole)

    now = np.asarray(s.log_probs(batch).log_probs)
    mask = np.asarray(batch.response_mask)
    loss = losses.clipped_policy_loss(now, rollout.log_probs, rollout.advantages, clip=0.2).loss
    loss = np.where(mask, loss + 0.2 * kl.kl_estimate("k3", now, rollout.reference_log_probs), 0.0)
    means = loss.sum(axis=1) / (mask.sum(axis=1) if aggregation == "sequence" else T)
    assert np.isclose(metrics["loss"], means.mean() + 0.5 * metrics["ptx_loss"], rtol=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_unlikely_tokens_outside_the_mask_have_no_gradient(aggregation, estimator):
    """Of log-probs at which the exponential of k3 overflows, in one pass and in several."""
    batch, old, _ = made_up()
    mask = batch.response_mask
    config = PPOConfig(advantage="grpo", kl_coef=0.3, loss_aggregation=aggregation, kl_loss_estimator=estimator)
    rollout = Rollout(batch, old.log_probs, old.reference_log_probs, None, jnp.where(mask, 1.0, 0.0), None)

    def loss(log_probs):
        token = TokenStatistics(log_probs, old.entropy, batch.responses, old.log_probs)
        (total, _), aux = ppo_loss.policy_terms(token, rollout, config)
        return total, aux

    def run(outside):
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.where(mask, old.log_probs, outside))

    clean = run(0.0)
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(run(-100.0), clean)
    assert not np.asarray(clean[1])[~np.asarray(mask)].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("advantage", "kl_coef", "at_end"),
    [("gae", 0.03, False), ("rloo", 0.03, True), ("grpo", 0.1, False), ("reinforce++", 0.03, False)],
)
def test_every_advantage_learns_a_pattern(tmp_path, advantage, kl_coef, at_end):
    """From a sixteenth a token to at least 0.95, of 16 prompts with eight responses each.

    Three of four tokens are one, which a policy without a KL finds first and then writes four times: 0.75.
    """
    options = {"num_epochs": 2, "num_minibatches": 4, "kl_coef": kl_coef, "missing_end_penalty": 0.0}
    options["whiten_advantages"] = advantage == "gae"
    config = experiment(num_steps=140, batch_size=128, new_tokens=4, lr=3e-3, n=8, advantage=advantage, **options)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule="linear"))
    if not at_end:
        config = dataclasses.replace(config, reward=RewardConfig(kind="margin", model="none"))
    s = Setup(config, reward=functools.partial(pattern_reward, at_end=at_end))
    _, finished, recorded, _ = fit(s, tmp_path / "checkpoints", num_steps=140)
    rewards = [row["reward_uncalibrated"] for row in recorded.steps]
    assert finished and rewards[0] < 0.2 and np.mean(rewards[-4:]) >= 0.95, rewards[::10]
    assert all(("equal_groups" in row) == (advantage != "gae") for row in recorded.steps)
