"""GAE and explained variance against hand-worked cases and NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.ops import advantages

gae = jax.jit(advantages.gae)
explained_variance = jax.jit(advantages.explained_variance)


def random_case(seed=0, B=7, T=10):
    """Rewards, values and the mask of responses of 0 to T tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, T + 1, B)
    lengths[:3] = 0, 1, T
    rewards, values = rng.normal(0, 0.7, (2, B, T)).astype(np.float32)
    return jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(np.arange(T) < lengths[:, None])


# --- GAE


def test_gae_by_hand():
    rewards = jnp.asarray([[0.25, -0.5, 0.7], [0.7, 9.0, 9.0]])
    values = jnp.asarray([[0.5, 0.25, 1.0], [0.3, 9.0, 9.0]])
    mask = jnp.asarray([[True, True, True], [True, False, False]])
    got, returns = gae(rewards, values, mask, discount=0.5, gae_lambda=0.5)
    # delta = 0.25 + 0.125 - 0.5, -0.5 + 0.5 - 0.25, 0.7 - 1; each A is its delta and a quarter of the next A
    np.testing.assert_allclose(got, [[-0.20625, -0.325, -0.3], [0.4, 0, 0]], rtol=1e-5)
    np.testing.assert_allclose(returns, [[0.29375, -0.075, 0.7], [0.7, 0, 0]], rtol=1e-5)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.6), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_a_numpy_double_loop(discount, gae_lambda):
    rewards, values, mask = random_case(1)
    got, returns = gae(rewards, values, mask, discount=discount, gae_lambda=gae_lambda)
    assert got.dtype == returns.dtype == jnp.float32
    for row in range(mask.shape[0]):
        length = int(mask[row].sum())
        v = [*map(float, values[row, :length]), 0.0]
        deltas = [float(rewards[row, t]) + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(mask.shape[1]):
            want = sum((discount * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length))
            assert float(got[row, t]) == pytest.approx(want, abs=1e-5), (row, t)
            assert float(returns[row, t]) == pytest.approx(want + v[t] if t < length else 0.0, abs=1e-5), (row, t)


def test_at_lambda_one_returns_are_the_discounted_rewards():
    """Whatever the critic says."""
    rewards, values, mask = random_case(2)
    _, returns = gae(rewards, values, mask, discount=0.9, gae_lambda=1.0)
    _, of_another = gae(rewards, -3.0 * values, mask, discount=0.9, gae_lambda=1.0)
    np.testing.assert_allclose(returns, of_another, atol=1e-5)
    kept = np.where(mask, rewards, 0.0)
    to_come = [sum(0.9**k * kept[:, t + k] for k in range(kept.shape[1] - t)) for t in range(kept.shape[1])]
    np.testing.assert_allclose(returns, np.where(mask, np.stack(to_come, axis=1), 0.0), atol=1e-5)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, 1e30])
def test_gae_ignores_padding(poison):
    rewards, values, mask = random_case(3)
    want = gae(rewards, values, mask, discount=0.97, gae_lambda=0.9)
    dirty = [jnp.where(mask, x, poison) for x in (rewards, values)]
    wide = [jnp.pad(x, ((0, 0), (0, 3)), constant_values=poison) for x in dirty]
    for got, clean in zip(
        gae(*wide, jnp.pad(mask, ((0, 0), (0, 3))), discount=0.97, gae_lambda=0.9), want, strict=True
    ):
        np.testing.assert_array_equal(got[:, :10], clean)
        assert (jnp.where(jnp.pad(mask, ((0, 0), (0, 3))), 0.0, got) == 0).all()


def test_gae_refuses_rewards_that_are_whole_numbers():
    rewards, values, mask = random_case(4)
    for kind in (jnp.int32, bool):
        with pytest.raises(AssertionError):
            advantages.gae(rewards.astype(kind), values, mask, discount=1.0, gae_lambda=0.95)
    with pytest.raises(AssertionError):
        advantages.gae(rewards, values, mask.astype(jnp.float32), discount=1.0, gae_lambda=0.95)
    with pytest.raises(AssertionError):
        advantages.gae(rewards[:, 1:], values, mask, discount=1.0, gae_lambda=0.95)


def test_gae_of_bfloat16_values_adds_up_in_float32():
    values = jnp.zeros((1, 600), jnp.bfloat16)
    got, _ = gae(jnp.ones((1, 600)), values, jnp.ones((1, 600), bool), discount=1.0, gae_lambda=1.0)
    # A bfloat16 sum of ones would stand still at 256.
    np.testing.assert_array_equal(got[0], np.arange(600, 0, -1))


def test_gae_jit_agrees():
    case = random_case(5)
    eager = advantages.gae(*case, discount=0.9, gae_lambda=0.8)
    for a, b in zip(gae(*case, discount=0.9, gae_lambda=0.8), eager, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# --- explained variance


def test_explained_variance_by_hand():
    returns = jnp.asarray([[1.0, 2.0, 3.0, 99.0]])
    mask = jnp.asarray([[True, True, True, False]])
    score = functools.partial(explained_variance, returns=returns, mask=mask)
    assert float(score(returns)) == 1.0
    # A constant offset is no unexplained variance, and a constant explains none.
    assert float(score(returns + 0.5)) == pytest.approx(1.0, abs=1e-6)
    assert float(score(jnp.full((1, 4), 7.5))) == pytest.approx(0.0, abs=1e-6)
    # Half the slope leaves a quarter of the variance; the wrong sign makes it four times as much.
    assert float(score(returns / 2)) == pytest.approx(0.75)
    assert float(score(-returns)) == pytest.approx(-3.0)


def test_explained_variance_equals_numpys_and_ignores_padding():
    values, returns, mask = random_case(6)
    kept = np.asarray(mask)
    g, v = np.asarray(returns, np.float64)[kept], np.asarray(values, np.float64)[kept]
    want = 1 - (g - v).var() / g.var()
    dirty = jnp.where(mask, values, jnp.nan), jnp.where(mask, returns, jnp.inf)
    assert float(explained_variance(values, returns, mask)) == pytest.approx(want, rel=1e-5)
    assert float(explained_variance(*dirty, mask)) == pytest.approx(want, rel=1e-5)
    assert float(advantages.explained_variance(*dirty, mask)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("length", [0, 1, 7])
def test_returns_that_do_not_vary_are_explained_by_nothing(length):
    # 0.1 seven times: the mean in float32 is not exactly 0.1.
    mask = jnp.arange(7)[None] < length
    values = jnp.asarray(np.random.default_rng(7).normal(size=(1, 7)), jnp.float32)
    assert float(explained_variance(values, jnp.full((1, 7), 0.1), mask)) == 0.0


def test_a_return_that_is_not_a_number_is_not_hidden():
    values, returns, mask = random_case(8)
    assert np.isnan(explained_variance(values, returns.at[2, 0].set(jnp.nan), mask))
