"""Schedules and decay, by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrm.algorithms.optimizer import OptimizerConfig, build_optimizer, learning_rate


def one_update(config, params, grads):
    optimizer = build_optimizer(config, num_steps=10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_decay_is_the_rate_times_the_weight_and_spares_norms(name):
    """Adafactor too, whose own decay would take a tenth of every weight at every step."""
    params = {"kernel": jnp.full((4, 4), 2.0), "scale": jnp.full(4, 2.0)}
    config = OptimizerConfig(name=name, lr=1e-3, weight_decay=0.1, schedule="constant", warmup=0.0)
    after = one_update(config, params, {"kernel": jnp.zeros((4, 4)), "scale": jnp.zeros(4)})
    np.testing.assert_allclose(after["kernel"], 2.0 * (1 - 1e-3 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(after["scale"], params["scale"])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_first_update_goes_down_the_gradient_by_the_rate(name):
    params = {"kernel": jnp.zeros(3)}
    config = OptimizerConfig(name=name, lr=1e-3, schedule="constant", warmup=0.0, clip_norm=None)
    after = one_update(config, params, {"kernel": jnp.asarray([1.0, -1.0, 1.0])})
    np.testing.assert_allclose(after["kernel"], [-1e-3, 1e-3, -1e-3], rtol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_shortest_runs_have_a_rate_at_every_step(num_steps, schedule):
    for warmup in (0.0, 0.03, 0.5, 0.99):
        rate = learning_rate(OptimizerConfig(lr=1.0, warmup=warmup, schedule=schedule), num_steps)
        rates = [float(rate(step)) for step in range(num_steps)]
        assert all(0 < x <= 1 for x in rates), (warmup, rates)
        assert max(rates) == 1.0
