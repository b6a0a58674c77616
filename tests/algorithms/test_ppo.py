"""PPO: what a step reads, how rewards become advantages, what is minimized, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.ppo import (
    EIGHT,
    EOS,
    KEY,
    ONE,
    B,
    P,
    Rows,
    Setup,
    T,
    batch_of,
    data_of,
    experiment,
    fit,
    pattern_reward,
    ptx_rows,
    rewarded,
    rows_of_16,
    separate,
    stay,
)

from jaxrm.algorithms import ppo, ppo_loss, scoring
from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.ppo_state import PPOBatch, RewardAndKLState, steps_of
from jaxrm.algorithms.rollout import TokenLogProbs, build_sample
from jaxrm.errors import UserError
from jaxrm.models.sampling import GenerateOptions, response_keys
from jaxrm.ops import reward_scaling, token_rewards
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.preemption import StopRequest
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stages.ppo.checkpoints import restore, saved_arrays
from jaxrm.types import ResponseBatch


def rollout_of(s, batch, scores=None, feedback=None):
    scores = np.linspace(-1.3, 0.9, batch.responses.shape[0]) if scores is None else scores
    feedback = feedback or s.state.feedback
    return s.programs.estimate(feedback, batch, s.log_probs(batch), rewarded(batch, scores))


def other_weights(s, batch):
    """A policy that is not the reference."""
    return dataclasses.replace(s.state, policy=dataclasses.replace(s.state.policy, params=s.params(7)))


# --- what is read


@functools.partial(jax.jit, static_argnums=(0,))
def logits_of(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return model.logits(model(tokens, positions=positions, segment_ids=jnp.ones_like(tokens)))[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_policy_at_its_temperature(temperature):
    """Row by row without padding, by a softmax over whole logits; the reference at the same temperature."""
    s = separate(temperature)
    batch = batch_of()
    state = other_weights(s, batch)
    found = s.log_probs(batch, state)
    for row in range(B):
        prompt = np.asarray(batch.prompts[row])[np.asarray(batch.prompt_mask[row])]
        response = np.asarray(batch.responses[row])[np.asarray(batch.response_mask[row])]
        tokens = np.zeros((1, P + T), np.int32)
        tokens[0, : len(prompt) + len(response)] = np.concatenate([prompt, response])
        for log_probs, params in (
            (found.log_probs, state.policy.params),
            (found.reference_log_probs, s.reference),
        ):
            logits = np.asarray(logits_of(s.networks.decoder, params, tokens), np.float64) / temperature
            normal = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            expected = [normal[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
            np.testing.assert_allclose(log_probs[row, : len(response)], expected, atol=2e-5)
    outside = ~np.asarray(batch.response_mask)
    assert all(not np.asarray(x)[outside].any() for x in jax.tree.leaves(found))


def test_draws_at_a_temperature_have_the_log_probs_of_training():
    """Frequencies of one token over many draws against ``log_probs`` at temperature 0.7."""
    config = experiment(temperature=0.7, batch_size=2048, new_tokens=1)
    s = Setup(config)
    prompts = jnp.tile(jnp.asarray([[2, 3, 4, 5, 6]], jnp.int32), (2048, 1))
    batch, log_probs = s.programs.rollout(s.reference, prompts, jnp.ones((2048, P), bool), KEY)
    probability = np.exp(np.asarray(s.log_probs(batch).log_probs[:, 0]))
    np.testing.assert_allclose(np.exp(log_probs[:, 0]), probability, rtol=1e-5)
    drawn = np.asarray(batch.responses[:, 0])
    checked = 0
    for token in range(16):
        at = drawn == token
        if at.sum() > 50:
            p = probability[at][0]
            assert abs(at.mean() - p) < 4 * np.sqrt(p * (1 - p) / 2048)
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shared", [False, True])
def test_before_the_first_update_the_ratio_is_1_and_the_kl_0(temperature, shared):
    s = Setup(experiment(temperature=temperature, shared_trunk=shared)) if shared else separate(temperature)
    batch = batch_of(3)
    rollout, _, metrics = rollout_of(s, batch)
    (_, _), aux = jax.jit(ppo_loss.policy_loss(s.networks, s.config.ppo))(s.state.policy.params, PPOBatch(rollout), KEY)
    means = {name: float(total / weight) for name, (total, weight) in aux.items()}
    assert means["ratio_error"] < 1e-5 and abs(means["approx_kl"]) < 1e-5 and means["clip_fraction"] == 0
    assert abs(float(metrics["kl"])) < 1e-5 and abs(float(metrics["kl_error"])) < 1e-5
    assert np.isclose(means["policy_loss"], -np.asarray(rollout.advantages)[np.asarray(batch.response_mask)].mean())


def test_padding_and_its_id_change_nothing():
    s = separate()
    state = other_weights(s, None)
    grad = jax.jit(
        jax.grad(lambda params, batch: ppo_loss.policy_loss(s.networks, s.config.ppo)(params, batch, KEY)[0][0])
    )

    def everything(batch):
        log_probs = s.log_probs(batch, state)
        rollout, _, metrics = s.programs.estimate(s.state.feedback, batch, log_probs, rewarded(batch, np.arange(B) / 7))
        return rollout, metrics, grad(s.reference, PPOBatch(rollout))

    plain, metrics, gradient = everything(batch_of())
    for other in (batch_of(fill=9), batch_of(width=P + 3, length=T + 2)):
        wide, wide_metrics, wide_gradient = everything(other)
        for name in ("log_probs", "reference_log_probs", "values", "advantages", "returns"):
            np.testing.assert_allclose(getattr(wide, name)[:, :T], getattr(plain, name), rtol=1e-5, atol=1e-5)
            assert not np.asarray(getattr(wide, name)[:, T:]).any()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), wide_gradient, gradient)
        assert all(np.isclose(wide_metrics[name], metrics[name], atol=1e-5) for name in metrics)


# --- from rewards to advantages


def loop(rewards, log_probs, reference, values, lengths, *, beta, limit, discount, lam):
    """METHOD in plain Python: shaped rewards, advantages and returns, one response at a time."""
    shaped, advantages = np.zeros_like(rewards), np.zeros_like(rewards)
    for b, n in enumerate(lengths):
        for t in range(n):
            shaped[b, t] = np.clip(rewards[b, t] - beta * (log_probs[b, t] - reference[b, t]), -limit, limit)
        running = 0.0
        for t in reversed(range(n)):
            following = values[b, t + 1] if t + 1 < n else 0.0
            running = shaped[b, t] + discount * following - values[b, t] + discount * lam * running
            advantages[b, t] = running
    return shaped, advantages


def made_up(seed=5):
    rng = np.random.default_rng(seed)
    batch = batch_of(seed)
    mask = np.asarray(batch.response_mask)
    arrays = [np.where(mask, rng.normal(size=(B, T)), 0.0).astype(np.float32) for _ in range(5)]
    readings = TokenLogProbs(*map(jnp.asarray, (arrays[0] - 2, np.abs(arrays[1]), arrays[2] - 2, arrays[3])))
    readings = jax.tree.map(lambda x: jnp.where(batch.response_mask, x, 0.0), readings)
    return batch, mask, readings, arrays[4]


@pytest.mark.parametrize("kind", ["soft", "scalar"])
def test_advantages_are_those_of_a_plain_loop(kind):
    batch, mask, readings, values = made_up()
    lengths = mask.sum(axis=1)
    if kind == "scalar":
        values = np.asarray(token_rewards.scalar(jnp.linspace(-0.8, 0.7, B), batch.response_mask))
        assert all(values[b, n - 1] != 0 and not values[b, : n - 1].any() for b, n in enumerate(lengths))
    config = PPOConfig(kl_coef=0.3, reward_clip=0.7, discount=0.9, gae_lambda=0.7, missing_end_penalty=0.0)
    calibration = reward_scaling.Calibration(*map(jnp.float32, (0.5, 0.2, 0.0, 0.0)))
    rewards = scoring.as_token_rewards(
        calibration, KINDS[kind], jnp.asarray(values), batch.response_mask, batch, (EOS,)
    )
    by_hand = np.where(mask, 0.5 * (values - (0.2 if kind == "soft" else 0.0)), 0.0)

    def next_calibration(now, rewards):
        return reward_scaling.update_center(now, KINDS[kind], rewards.values, rewards.mask, momentum=0.6)

    estimate = jax.jit(functools.partial(ppo.estimate, config=config, next_calibration=next_calibration))
    rollout, feedback, metrics = estimate(RewardAndKLState(calibration, jnp.float32(0.3)), batch, readings, rewards)

    log_probs, reference, old = (
        np.asarray(x) for x in (readings.log_probs, readings.reference_log_probs, readings.values)
    )
    shaped, expected = loop(by_hand, log_probs, reference, old, lengths, beta=0.3, limit=0.7, discount=0.9, lam=0.7)
    assert np.abs(shaped).max() == np.float32(0.7)  # the clip is used
    np.testing.assert_allclose(rollout.advantages, expected, atol=1e-5)
    np.testing.assert_allclose(rollout.returns, np.where(mask, expected + old, 0.0), atol=1e-5)
    each = np.where(mask, log_probs - reference, 0.0).sum(axis=1)
    assert np.isclose(metrics["kl"], each.mean(), atol=1e-5)
    assert np.isclose(metrics["kl_error"], each.std() / np.sqrt(B), atol=1e-5)
    assert np.isclose(ppo.reward_metrics(rewards, weights={})["reward"], by_hand.sum(axis=1).mean(), atol=1e-5)
    assert np.isclose(metrics["return"], shaped.sum(axis=1).mean(), atol=1e-5)
    assert metrics["tokens"] == mask.sum() and np.isclose(metrics["response_length"], lengths.mean())
    moved = 0.6 * 0.2 + 0.4 * values[mask].mean() if kind == "soft" else 0.2
    assert np.isclose(feedback.calibration.center, moved, atol=1e-6)


def test_a_response_that_was_cut_off_pays_at_its_last_token():
    batch, mask, readings, _ = made_up()
    readings = jax.tree.map(jnp.zeros_like, readings)
    rewards = rewarded(batch, np.zeros(B))
    config = PPOConfig(missing_end_penalty=0.75, gae_lambda=0.0)
    estimate = jax.jit(functools.partial(ppo.estimate, config=config, next_calibration=stay))
    rollout, _, metrics = estimate(separate().state.feedback, batch, readings, rewards)
    expected = np.zeros((B, T))
    for b, n in enumerate(mask.sum(axis=1)):
        ended = int(batch.responses[b, n - 1]) == EOS
        expected[b, n - 1] = 0.0 if ended else -0.75
    assert 0 < metrics["ended"] < 1 and ppo.reward_metrics(rewards, weights={})["reward"] == 0
    np.testing.assert_allclose(rollout.advantages, expected)


def test_a_response_that_was_cut_off_is_worth_less_by_default():
    """Two tokens each, score 2 on the last, values 1/2 and 1/4: only the first one ends, and is worth 1 more there."""
    responses = jnp.asarray([[5, EOS], [5, 5]])
    whole = jnp.ones((2, 2), bool)
    batch = ResponseBatch(jnp.ones((2, 1), jnp.int32), jnp.ones((2, 1), bool), responses, whole)
    blank = jnp.zeros((2, 2))
    readings = TokenLogProbs(blank, blank, blank, jnp.asarray([[0.5, 0.25], [0.5, 0.25]]))
    values = token_rewards.scalar(jnp.asarray([2.0, 2.0]), whole)
    rewards = scoring.as_token_rewards(reward_scaling.uncalibrated(), KINDS["scalar"], values, whole, batch, (EOS,))
    feedback = RewardAndKLState(reward_scaling.uncalibrated(), jnp.float32(0.0))
    rollout, _, _ = ppo.estimate(feedback, batch, readings, rewards, config=PPOConfig(), next_calibration=stay)
    # delta_1 = 2 - 1/4, or 1 - 1/4 where the end is missing; delta_0 = 1/4 - 1/2; A_0 = delta_0 + 0.95 delta_1
    expected = np.asarray([[-0.25 + 0.95 * 1.75, 1.75], [-0.25 + 0.95 * 0.75, 0.75]])
    np.testing.assert_allclose(rollout.advantages, expected, rtol=1e-6)
    np.testing.assert_allclose(rollout.returns, expected + np.asarray([0.5, 0.25]), rtol=1e-6)


def test_an_end_that_the_reward_model_tags_minus_costs_more():
    """Of an end with tag +, one with tag - and a missing one only the second is early; kinds without tags have none."""
    responses = jnp.asarray([[5, EOS], [5, EOS], [5, 5]])
    whole = jnp.ones((3, 2), bool)
    batch = ResponseBatch(jnp.ones((3, 1), jnp.int32), jnp.ones((3, 1), bool), responses, whole)
    blank = jnp.zeros((3, 2))
    tags = jnp.asarray([[True, True], [True, False], [True, False]])
    config = PPOConfig(early_end_penalty=0.5, missing_end_penalty=0.75, gae_lambda=0.0)
    feedback = RewardAndKLState(reward_scaling.uncalibrated(), jnp.float32(0.0))
    for kind, early in (("literal", -0.5), ("scalar", 0.0)):
        own = tags if kind == "literal" else whole
        rewards = scoring.as_token_rewards(reward_scaling.uncalibrated(), KINDS[kind], blank, own, batch, (EOS,))
        readings = TokenLogProbs(blank, blank, blank, blank)
        rollout, _, _ = ppo.estimate(feedback, batch, readings, rewards, config=config, next_calibration=stay)
        np.testing.assert_allclose(rollout.advantages, [[0, 0], [0, early], [0, -0.75]], rtol=1e-6)
        assert ppo.reward_metrics(rewards, weights={})["reward"] == 0


def test_whitening_and_normalizing_look_at_response_tokens_alone():
    batch, mask, readings, values = made_up()
    rewards = scoring.as_token_rewards(
        reward_scaling.uncalibrated(), KINDS["margin"], jnp.asarray(values), batch.response_mask, batch, (EOS,)
    )

    def estimated(**options):
        config = PPOConfig(kl_coef=0.0, gae_lambda=0.0, discount=0.5, missing_end_penalty=0.0, **options)
        estimate = jax.jit(functools.partial(ppo.estimate, config=config, next_calibration=stay))
        blank = jax.tree.map(jnp.zeros_like, readings)
        zero = RewardAndKLState(reward_scaling.uncalibrated(), jnp.float32(0.0))
        return np.asarray(estimate(zero, batch, blank, rewards)[0].advantages)

    np.testing.assert_allclose(estimated(), values, atol=1e-6)
    inside = values[mask]
    np.testing.assert_allclose(estimated(normalize_rewards=True)[mask], inside / inside.std(), rtol=1e-5)
    whitened = estimated(whiten_advantages=True)
    np.testing.assert_allclose(whitened[mask], (inside - inside.mean()) / inside.std(), atol=1e-5)
    assert not whitened[~mask].any()


def test_the_controller_raises_the_penalty_of_a_kl_above_target():
    batch, _, readings, _ = made_up()
    apart = readings._replace(reference_log_probs=readings.log_probs - 0.4 * batch.response_mask)
    config = PPOConfig(kl_coef=0.1, kl_target=0.5, kl_horizon=100)
    estimate = jax.jit(functools.partial(ppo.estimate, config=config, next_calibration=stay))
    feedback = RewardAndKLState(reward_scaling.uncalibrated(), jnp.float32(0.1))
    _, after, metrics = estimate(feedback, batch, apart, rewarded(batch, np.zeros(B)))
    assert metrics["kl"] > 0.6  # more than a fifth above the target, so the step is a fifth of 8 / 100
    assert np.isclose(after.kl_coef, 0.1 * (1 + 0.2 * B / 100))


# --- what is minimized


def test_minibatches_share_the_responses_out():
    rollout, _, _ = rollout_of(separate(), batch_of())
    split = jax.jit(functools.partial(ppo.minibatch, num_minibatches=4))
    for key in (KEY, jax.random.key(1)):
        parts = [split(rollout, key, np.int32(i)) for i in range(4)]
        rows = np.concatenate([np.asarray(part.responses.responses) for part in parts])
        order = np.lexsort(rows.T), np.lexsort(np.asarray(rollout.responses.responses).T)
        np.testing.assert_array_equal(rows[order[0]], np.asarray(rollout.responses.responses)[order[1]])
        together = np.concatenate([np.asarray(part.advantages) for part in parts])
        np.testing.assert_array_equal(together[order[0]], np.asarray(rollout.advantages)[order[1]])
    first, second = (np.asarray(split(rollout, key, np.int32(0)).advantages) for key in (KEY, jax.random.key(1)))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_sft_term_is_its_own_mean_however_the_batch_is_cut(parts):
    """One step of plain SGD moves the parameters by the gradient of policy mean + coefficient x SFT mean."""
    import optax

    from jaxrm.algorithms.train_step import build_train_step

    s = separate()
    config = dataclasses.replace(s.config.ppo, ptx_coef=0.5, kl_loss_coef=0.2)
    rollout, _, _ = rollout_of(s, batch_of())
    loss_fn = ppo_loss.policy_loss(s.networks, config)
    rows = s.learner.shardings.policy.step
    optimizer = optax.sgd(1.0)
    state = s.init_state().policy
    before = jax.tree.map(jnp.copy, state.params)
    sgd = dataclasses.replace(state, opt_state=optimizer.init(state.params))
    sharding = dataclasses.replace(s.learner.shardings.policy, opt_state=jax.tree.map(lambda _: rows, sgd.opt_state))
    step = build_train_step(loss_fn, optimizer, state_sharding=sharding, batch_sharding=rows, num_microbatches=parts)
    moved, metrics = step(sgd, {}, jax.jit(ppo.weigh)(rollout, ptx_rows()))

    def expected(params):
        (total, weight), _ = loss_fn(params, PPOBatch(rollout), KEY)
        (sft, tokens), _ = ppo_loss.sft_loss(s.networks.decoder)(params, ptx_rows(), KEY)
        return total / weight + 0.5 * sft / tokens

    loss, gradient = jax.jit(jax.value_and_grad(expected))(before)
    assert np.isclose(metrics["loss"], loss, atol=1e-5) and metrics["ptx_loss"] > 0
    jax.tree.map(lambda a, b, g: np.testing.assert_allclose(a - b, g, atol=1e-5), before, moved.params, gradient)


def test_a_shared_trunk_adds_both_losses_under_one_optimizer():
    s = Setup(experiment(shared_trunk=True, value_coef=0.3))
    rollout, _, _ = rollout_of(s, batch_of())
    (total, weight), aux = jax.jit(ppo_loss.policy_loss(s.networks, s.config.ppo))(
        s.state.policy.params, PPOBatch(rollout), KEY
    )
    parts = {name: float(x / w) for name, (x, w) in aux.items()}
    assert np.isclose(total / weight, parts["policy_loss"] + 0.3 * parts["value_loss"], atol=1e-5)
    mask = np.asarray(rollout.responses.response_mask)
    assert np.isclose(parts["value_loss"], 0.5 * np.mean(np.asarray(rollout.returns)[mask] ** 2), atol=1e-5)
    head = np.asarray(s.state.policy.params["scalar_head"]["kernel"])
    frozen = s.learner.networks.frozen({})
    state, rows = ppo.update(s.programs, s.config.ppo, s.state, frozen, rollout, KEY, lambda: None)
    assert state.critic is None and not np.array_equal(state.policy.params["scalar_head"]["kernel"], head)
    assert {"policy_loss", "value_loss", "grad_norm"} <= set(rows[0])


# --- whole steps


@pytest.mark.each_python
@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["own critic", "shared trunk"])
def test_it_learns_to_emit_a_pattern(tmp_path, shared):
    """From chance (a sixteenth a token) to at least 0.9 in 100 steps of 64 responses of four tokens.

    Three of the four are one token. Without a KL a policy may stay at writing it four times, 0.75.
    """
    options = {"num_epochs": 2, "num_minibatches": 4, "kl_coef": 0.03, "whiten_advantages": True, "value_coef": 0.5}
    config = experiment(num_steps=100, batch_size=64, new_tokens=4, lr=5e-3, shared_trunk=shared, **options)
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, schedule="linear"),
        ppo=dataclasses.replace(config.ppo, missing_end_penalty=0.0),  # a pattern has no end
    )
    s = Setup(config, reward=pattern_reward)
    _, finished, told, checkpoints = fit(s, tmp_path / "checkpoints", num_steps=100)
    rewards = [row["reward_uncalibrated"] for row in told.steps]
    assert finished and rewards[0] < 0.2 and np.mean(rewards[-3:]) >= 0.9, rewards[::10]
    assert all(row["ratio_error/first"] < 1e-5 and abs(row["approx_kl/first"]) < 1e-5 for row in told.steps)
    assert told.steps[-1]["entropy"] < told.steps[0]["entropy"] and checkpoints.steps() == [100]
    programs = [
        s.programs.rollout.sample,
        s.programs.log_probs,
        s.programs.estimate,
        s.programs.update_policy,
        s.programs.minibatch,
    ]
    assert [program._cache_size() for program in programs] == [1] * 5  # nothing was compiled twice


@pytest.mark.each_python
@pytest.mark.slow
def test_one_device_and_eight_agree(tmp_path):
    """Three steps: the same tokens, and losses, rewards and KL within 1e-4 in float32; eight lie anew to answer."""
    told = {}
    for name, mesh, rollout_model in (("one", ONE, None), ("eight", EIGHT, MeshConfig())):
        config = experiment(batch_size=16, parts=2, lr=1e-3, rollout_model=rollout_model)
        s = Setup(config, mesh, reward=pattern_reward)
        told[name] = fit(s, tmp_path / name, num_steps=3)[2].steps
    for one, eight in zip(told["one"], told["eight"], strict=True):
        assert one["tokens"] == eight["tokens"]
        for field in (
            "loss",
            "policy_loss",
            "value_loss",
            "reward",
            "kl",
            "entropy",
            "explained_variance",
            "grad_norm",
        ):
            assert np.isclose(one[field], eight[field], rtol=1e-4, atol=1e-5), field


@pytest.mark.slow
def test_responses_to_a_prompt_lie_next_to_each_other():
    """Greedily, on eight devices that lie anew to answer, and in parts: each is that of the prompt alone."""
    config = experiment(batch_size=32, temperature=0.0)
    rollout = dataclasses.replace(
        config.rollout, mesh=MeshConfig(data=2, tensor=4), responses_per_prompt=4, num_microbatches=2
    )
    s = Setup(dataclasses.replace(config, rollout=rollout), EIGHT)
    rng, rows = np.random.default_rng(0), jax.NamedSharding(s.mesh, jax.P(("data", "fsdp")))
    prompts = rng.integers(2, 16, (8, P)).astype(np.int32), np.arange(P)[None] >= rng.integers(0, 3, (8, 1))
    batch = s.programs.rollout(s.reference, *jax.device_put(prompts, rows), KEY).responses
    alone = s.learner.sampler(config.rollout.sampling)
    alone = alone(s.reference, *jax.device_put([np.tile(x, (4, 1)) for x in prompts], rows), KEY).responses
    assert batch.responses.shape == (32, T) and batch.responses.sharding.is_equivalent_to(rows, 2)
    for name in ("prompts", "prompt_mask", "responses", "response_mask"):
        np.testing.assert_array_equal(getattr(batch, name), np.repeat(getattr(alone, name)[:8], 4, axis=0), name)


@pytest.mark.slow
def test_moments_of_both_optimizers_may_lie_with_the_hosts():
    config = experiment()
    policy, critic = (dataclasses.replace(one, offload=True) for one in (config.optimizer, config.critic.optimizer))
    away = Setup(
        dataclasses.replace(config, optimizer=policy, critic=dataclasses.replace(config.critic, optimizer=critic))
    )
    here, found = separate(), []
    rollout, _, _ = rollout_of(here, batch_of())
    for s in (here, away):
        state = s.init_state(3)
        of_policy = s.programs.update_policy(state.policy, {}, PPOBatch(rollout))
        of_critic = s.programs.update_critic(state.critic, {}, PPOBatch(rollout))
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves((of_policy[0].opt_state, of_critic[0].opt_state))}
        assert ("pinned_host" in kinds) == (s is away)
        found.append(jax.device_get((of_policy[0].params, of_policy[1], of_critic[0].params, of_critic[1])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=2, tensor=2, context=2), MeshConfig(data=1, context=4)],
    ids=["with context", "context alone"],
)
def test_a_step_is_the_same_where_devices_share_a_rows_tokens(mesh):
    """Rows of 11 and responses of 6 tokens do not divide over four: rows are filled up, responses left whole."""
    found = []
    for s in (separate(), Setup(experiment(), mesh)):
        rollout, _, metrics = rollout_of(s, batch_of())
        state = s.init_state(3)
        _, of_policy = s.programs.update_policy(state.policy, {}, PPOBatch(rollout))
        _, of_critic = s.programs.update_critic(state.critic, {}, PPOBatch(rollout))
        found.append(jax.device_get((rollout, metrics, of_policy, of_critic)))
    one, several = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), several, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rollout_model",
    [MeshConfig(), MeshConfig(tensor=2), MeshConfig(context=2)],
    ids=["whole", "split by heads", "kernels on each device"],
)
def test_a_policy_samples_alike_on_another_layout_of_devices(rollout_model):
    """Its copy is whole over what was fsdp, in the compute dtype, and gone after the call; the rows come back."""
    plain, other = (Setup(experiment(rollout_model=mesh), EIGHT) for mesh in (None, rollout_model))
    placed = Rows(plain.config, plain.mesh).place(1)
    asked, sampler = (placed.tokens, placed.mask), other.programs.rollout
    before = len(jax.live_arrays())
    batch, log_probs = jax.block_until_ready(sampler(other.reference, *asked, KEY))
    assert len(jax.live_arrays()) == before + len(jax.tree.leaves((batch, log_probs)))
    expected, expected_log_probs = plain.programs.rollout(plain.reference, *asked, KEY)
    np.testing.assert_allclose(log_probs, expected_log_probs, atol=1e-5)
    np.testing.assert_array_equal(batch.responses, expected.responses)
    np.testing.assert_array_equal(batch.response_mask, expected.response_mask)
    assert batch.responses.sharding == expected.responses.sharding
    kernel = sampler.reshard.params(other.reference)["layers"]["mlp"]["gate"]["kernel"]
    shape = (2, 32 // rollout_model.context, 64 // rollout_model.tensor)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {shape}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one device", "eight"])
def test_prompts_answered_in_parts_are_answered_alike(mesh):
    s = Setup(experiment(), mesh)
    build = functools.partial(
        build_sample,
        s.decoder.graphdef,
        options=GenerateOptions(s.config.rollout.sampling, (EOS,)),
        params_sharding=s.decoder.shardings,
        batch_sharding=partition.batch_sharding(s.mesh),
    )
    prompts, mask = map(np.asarray, Rows(s.config, s.mesh).place(1)[:2])
    keys = response_keys(KEY, len(prompts), 1)
    parts, whole = (build(num_microbatches=n)(s.reference, prompts, mask, keys) for n in (2, 1))
    np.testing.assert_array_equal(parts.responses.prompts, prompts)
    np.testing.assert_array_equal(parts.responses.responses, whole.responses.responses)
    np.testing.assert_array_equal(parts.responses.response_mask, whole.responses.response_mask)
    np.testing.assert_allclose(parts.log_probs, whole.log_probs, atol=1e-5)


def test_a_copy_to_answer_with_is_in_the_compute_dtype():
    config = experiment(rollout_model=MeshConfig())
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    s = Setup(half, EIGHT)
    copy = jax.eval_shape(s.programs.rollout.reshard.params, s.decoder.shapes)
    assert copy["layers"]["mlp"]["gate"]["kernel"].dtype == copy["embedder"]["embedding"].dtype == jnp.bfloat16
    assert copy["final_norm"]["scale"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("rollout_model", "batch_size", "words"),
    [
        (MeshConfig(data=3), 8, r"config\.rollout\.mesh is data 3.* 8 devices.*--config\.rollout\.mesh\.data=-1"),
        (MeshConfig(), 12, r"data\.batch_size is 12.* of config\.rollout\.mesh have 8 .*--config\.data\.batch_size=16"),
        (MeshConfig(tensor=8), 8, r"config\.rollout\.mesh\.tensor is 8.*'heads'.*--config\.rollout\.mesh\.tensor=4"),
    ],
)
def test_a_layout_to_answer_on_that_does_not_fit_is_an_error(rollout_model, batch_size, words):
    with pytest.raises(UserError, match=words):
        Setup(experiment(rollout_model=rollout_model, batch_size=batch_size), EIGHT)


@pytest.mark.slow
def test_a_step_that_was_not_finished_leaves_no_trace(tmp_path):
    """Asked to stop while responses are scored: what is saved is the state before, and it goes on alike."""
    s = rows_of_16()
    config = s.config
    whole, _, expected, _ = fit(s, tmp_path / "whole", num_steps=4, reward=pattern_reward)
    plain, stop, calls = pattern_reward, StopRequest(), []

    def interrupted(*args):
        calls.append(1)
        stop.requested = len(calls) == 3
        return plain(*args)

    rows = Rows(config, s.mesh)
    _, finished, told, checkpoints = fit(
        s, tmp_path / "cut", num_steps=4, reward=interrupted, stop=stop, state=s.init_state(), rows=rows
    )
    assert not finished and len(told.steps) == 2 and checkpoints.steps() == [2] and rows.at == 2
    fresh = Rows(config, s.mesh)
    state = restore(s.learner, checkpoints, data_of(fresh), KEY)
    checkpoints.close()
    assert fresh.at == 2 and steps_of(state, config.ppo) == 2
    after, finished, rest, _ = fit(s, tmp_path / "cut", num_steps=4, reward=plain, state=state, rows=fresh)
    assert finished
    times = ("seconds", "per_second")
    for one, other in zip(expected.steps[2:], rest.steps, strict=True):
        assert {k: v for k, v in one.items() if not k.endswith(times)} == {
            k: v for k, v in other.items() if not k.endswith(times)
        }
    for a, b in zip(jax.tree.leaves(whole.policy.params), jax.tree.leaves(after.policy.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_evaluation_that_was_cut_short_is_owed_and_made_good(tmp_path):
    """Asked to stop in the evaluation of the last step: the state is saved, the run not finished, and then it is."""
    s, stop = rows_of_16(), StopRequest()

    def cut_short(step, state):
        stop.requested = step == 2
        return None if stop.requested else {"eval_reward": 0.5}

    _, finished, told, checkpoints = fit(
        s, tmp_path, num_steps=2, reward=pattern_reward, evaluate=cut_short, stop=stop, eval_every=2
    )
    assert not finished and checkpoints.steps() == [2] and [step for step, _ in told.evaluations] == [0]
    fresh = Rows(s.config, s.mesh)
    state = restore(s.learner, checkpoints, data_of(fresh), KEY)
    checkpoints.close()
    _, finished, told, _ = fit(s, tmp_path, num_steps=2, state=state, rows=fresh, owed=True)
    assert finished and not told.steps and [step for step, _ in told.evaluations] == [2]


def test_a_reward_function_failing_in_evaluation_keeps_the_state(tmp_path):
    def fails(step, state):
        if step:
            raise UserError("config.reward.function my:function raised")
        return {"eval_reward": 0.5}

    with pytest.raises(UserError, match="my:function raised"):
        fit(rows_of_16(), tmp_path / "run", num_steps=4, reward=pattern_reward, evaluate=fails, eval_every=3)
    assert Checkpoints(tmp_path / "run", read_only=True).steps() == [3]


def test_a_reward_source_that_fails_leaves_the_state_saved(tmp_path):
    s = rows_of_16()
    plain, calls = pattern_reward, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise UserError("config.reward.function my:function raised")
        return plain(*args)

    with pytest.raises(UserError, match="my:function raised"):
        fit(s, tmp_path / "run", num_steps=4, reward=fails)
    assert Checkpoints(tmp_path / "run", read_only=True).steps() == [2]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["reward", "loss"])
def test_numbers_that_are_not_finite_stop_the_run_before_a_save(tmp_path, where):
    s = rows_of_16()
    if where == "loss":
        config = experiment(batch_size=16, lr=1e30)
        s = Setup(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_norm=None)))
    plain, calls = pattern_reward, []

    def source(*args):
        calls.append(1)
        found = plain(*args)
        if where == "reward" and len(calls) == 2:
            diagnostics = found.diagnostics | {"sum": found.diagnostics["sum"] * jnp.nan}
            return dataclasses.replace(found, rewards=found.rewards * jnp.nan, diagnostics=diagnostics)
        return found

    with pytest.raises(UserError, match=r"step \d.*(not finite|no finite number).*the last good checkpoint is"):
        fit(s, tmp_path / "run", num_steps=6, reward=source, every=1)
    kept = Checkpoints(tmp_path / "run", read_only=True)
    assert kept.steps() == [1]
    arrays = kept.restore(1, {"params": saved_arrays(s.learner.abstract, s.networks)["params"]})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(arrays)) or where == "loss"


@pytest.mark.slow
def test_a_checkpoint_is_whole(tmp_path):
    """Policy, critic, both optimizers, controller, calibration: each leaf comes back as it was."""
    s = Setup(experiment(batch_size=16, kl_target=0.1, kl_horizon=50))
    state, *_, checkpoints = fit(s, tmp_path / "run", num_steps=2, reward=pattern_reward)
    again = restore(s.learner, checkpoints, data_of(Rows(s.config, s.mesh)), KEY)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        plain = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b)]
        np.testing.assert_array_equal(*plain)
    assert float(again.feedback.kl_coef) != np.float32(0.02)
    with pytest.raises(UserError, match="no longer those"):
        restore(s.learner, checkpoints, data_of(Rows(s.config, s.mesh), "others"), KEY)
