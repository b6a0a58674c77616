"""PPO's maths against what peers have published: rlax live, TRL by recordings (tests/ops/record_trl*.py)."""

import functools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.ops import advantages, kl, token_rewards
from jaxrm.ops.advantages import gae
from jaxrm.ops.losses import aggregate, clipped_policy_loss, clipped_value_loss
from jaxrm.ops.masking import masked_mean, masked_whiten

RECORDED = Path(__file__).parent / "recorded" / "trl.npz"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def rlax():
    with warnings.catch_warnings():
        # tensorflow-probability, which rlax imports for its distributions, names parts of jax that are going.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pytest.importorskip("rlax", reason="rlax is not installed (tests/requirements.txt)")


@pytest.fixture(scope="module")
def trl():
    with np.load(RECORDED, allow_pickle=False) as recorded:
        return {name: jnp.asarray(array) for name, array in recorded.items()}


def random_arrays(seed, count, shape=(6, 13)):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(0, 0.8, shape), jnp.float32) for _ in range(count)]


# --- rlax


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.93, 0.7)])
def test_gae_is_rlaxs_with_a_full_mask(rlax, discount, gae_lambda):
    rewards, values = random_arrays(0, 2)
    ours = jax.jit(gae)(rewards, values, jnp.ones((6, 13), bool), discount=discount, gae_lambda=gae_lambda)
    with_the_end = jnp.pad(values, ((0, 0), (0, 1)))
    discounts = jnp.full_like(rewards, discount)
    theirs = jax.jit(jax.vmap(rlax.truncated_generalized_advantage_estimation, (0, 0, None, 0)))(
        rewards, discounts, gae_lambda, with_the_end
    )
    np.testing.assert_allclose(ours[0], theirs, **TOLERANCE)
    np.testing.assert_allclose(ours[1], theirs + values, **TOLERANCE)


def test_gae_of_responses_of_any_length_is_rlaxs(rlax):
    """rlax has no mask: there a discount of zero ends a response."""
    rewards, values = random_arrays(1, 2)
    lengths = np.asarray([13, 1, 5, 12, 8, 2])[:, None]
    mask = jnp.asarray(np.arange(13) < lengths)
    discounts = jnp.asarray(np.where(np.arange(13) == lengths - 1, 0.0, 0.9), jnp.float32)
    ours, _ = jax.jit(gae)(rewards, values, mask, discount=0.9, gae_lambda=0.8)
    theirs = jax.jit(jax.vmap(rlax.truncated_generalized_advantage_estimation, (0, 0, None, 0)))(
        rewards, discounts, 0.8, jnp.pad(values, ((0, 0), (0, 1)))
    )
    np.testing.assert_allclose(ours[mask], theirs[mask], **TOLERANCE)


def test_the_clipped_policy_loss_and_its_gradient_are_rlaxs(rlax):
    log_probs, old_log_probs, advantages = random_arrays(2, 3, (200,))

    def ours(log_probs):
        loss = clipped_policy_loss(log_probs, old_log_probs, advantages, clip=0.2).loss
        return loss.sum(), loss

    def theirs(log_probs):
        ratio = jnp.exp(log_probs - old_log_probs)
        # rlax averages over time: of one step, that is the step's loss.
        loss = jax.vmap(rlax.clipped_surrogate_pg_loss, (0, 0, None))(ratio[:, None], advantages[:, None], 0.2)
        return loss.sum(), loss

    gradient, loss = jax.jit(jax.grad(ours, has_aux=True))(log_probs)
    published_gradient, published = jax.jit(jax.grad(theirs, has_aux=True))(log_probs)
    np.testing.assert_allclose(loss, published, **TOLERANCE)
    np.testing.assert_allclose(gradient, published_gradient, **TOLERANCE)
    assert 20 < int((gradient == 0).sum()) < 180


# --- TRL


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_rewards_less_the_kl_are_trls(trl, estimator):
    @jax.jit
    def ours(scores, log_probs, reference_log_probs, mask, coefficient):
        rewards = token_rewards.scalar(scores, mask)
        return kl.penalized_rewards(
            rewards, log_probs, reference_log_probs, mask, coefficient=coefficient, limit=50.0, estimator=estimator
        )

    rewards = ours(trl["scores"], trl["old_log_probs"], trl["reference_log_probs"], trl["mask"], trl["kl_coefficient"])
    np.testing.assert_allclose(rewards, trl[f"trl_rewards_{estimator}"], **TOLERANCE)


def test_whitening_is_trls_up_to_bessels_correction(trl):
    """TRL divides the variance by one token less."""
    rewards, mask = trl["trl_rewards_k1"], trl["mask"]
    whiten = jax.jit(masked_whiten, static_argnames="shift_mean")
    count = int(mask.sum())
    factor = np.sqrt((count - 1) / count)
    np.testing.assert_allclose(factor * whiten(rewards, mask), trl["trl_whitened"], **TOLERANCE)
    mean = masked_mean(rewards, mask)
    moved = jnp.where(mask, factor * (whiten(rewards, mask, shift_mean=False) - mean) + mean, 0.0)
    np.testing.assert_allclose(moved, trl["trl_whitened_about_the_mean"], **TOLERANCE)


def test_advantages_and_returns_are_trls(trl):
    mask = trl["mask"]
    advantages, returns = jax.jit(gae)(
        trl["trl_rewards_k1"], trl["old_values"], mask, discount=trl["gamma"], gae_lambda=trl["lam"]
    )
    np.testing.assert_allclose(returns, trl["trl_returns"], **TOLERANCE)
    count = int(mask.sum())
    whitened = np.sqrt((count - 1) / count) * masked_whiten(advantages, mask)
    np.testing.assert_allclose(whitened, trl["trl_whitened_advantages"], **TOLERANCE)


@pytest.mark.parametrize("loss", ["policy", "value"])
def test_losses_gradients_and_clip_fractions_are_trls(trl, loss):
    if loss == "policy":
        function = functools.partial(clipped_policy_loss, clip=trl["cliprange"])
        arguments = trl["log_probs"], trl["old_log_probs"], trl["trl_whitened_advantages"]
    else:
        function = functools.partial(clipped_value_loss, clip=trl["cliprange_value"])
        arguments = trl["values"], trl["old_values"], trl["trl_returns"]

    def mean(moved, *others):
        result = function(moved, *others)
        return masked_mean(result.loss, trl["mask"]), masked_mean(result.is_clipped, trl["mask"])

    (value, clipped), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(*arguments)
    np.testing.assert_allclose(value, trl[f"trl_{loss}_loss"], **TOLERANCE)
    np.testing.assert_allclose(gradient, trl[f"trl_{loss}_gradient"], **TOLERANCE)
    np.testing.assert_allclose(clipped, trl[f"trl_{loss}_clipped"], **TOLERANCE)
    assert 0 < float(clipped) < 1


def test_the_adaptive_controller_is_trls(trl):
    update = jax.jit(kl.next_coefficient)
    coefficient, coefficients = trl["init_kl_coef"], []
    for seen in trl["kls"]:
        coefficient = update(coefficient, seen, target=trl["target"], horizon=trl["horizon"], count=trl["batch"])
        coefficients.append(float(coefficient))
    np.testing.assert_allclose(coefficients, trl["trl_coefficients"], rtol=1e-6)


# --- TRL's GRPO and RLOO (tests/ops/record_trl_grpo.py)


@pytest.fixture(scope="module")
def trl_grpo():
    with np.load(RECORDED.parent / "trl_grpo.npz", allow_pickle=False) as recorded:
        return {name: jnp.asarray(array) for name, array in recorded.items()}


@pytest.mark.parametrize("function", [advantages.grpo, advantages.rloo])
def test_group_advantages_of_a_terminal_reward_are_trls(trl_grpo, function):
    mask = trl_grpo["mask"]
    rewards = token_rewards.scalar(trl_grpo["rewards"], mask)
    got = jax.jit(functools.partial(function, group_size=int(trl_grpo["n"]), is_terminal=True))(rewards, mask)
    expected = jnp.where(mask, trl_grpo[f"trl_{function.__name__}_advantages"][:, None], 0.0)
    np.testing.assert_allclose(got, expected, **TOLERANCE)
    assert not got[-int(trl_grpo["n"]) :].any()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_loss_of_grpo_and_its_gradient_are_trls(trl_grpo, aggregation):
    mask = trl_grpo["mask"]
    advantage = jnp.where(mask, trl_grpo["trl_grpo_advantages"][:, None], 0.0)
    low, high = float(trl_grpo["epsilon_low"]), float(trl_grpo["epsilon_high"])

    def ours(log_probs):
        surrogate = clipped_policy_loss(log_probs, trl_grpo["old_log_probs"], advantage, clip=low, clip_high=high)
        penalty = kl.kl_estimate("k3", log_probs, trl_grpo["reference_log_probs"])
        total, weight = aggregate(surrogate.loss + trl_grpo["beta"] * penalty, mask, aggregation)
        return total / weight

    loss, gradient = jax.jit(jax.value_and_grad(ours))(trl_grpo["log_probs"])
    np.testing.assert_allclose(loss, trl_grpo[f"trl_{aggregation}_loss"], **TOLERANCE)
    np.testing.assert_allclose(gradient, trl_grpo[f"trl_{aggregation}_gradient"], **TOLERANCE)
