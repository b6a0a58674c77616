"""The projection's own gradient against that which JAX derives from the same product."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.models.layers import _project
from jaxrm.models.lora import merged_product

SHAPES = {  # x, kernel, contracted axes
    "into heads": ((2, 5, 6), (6, 4, 3), 1),
    "out of heads": ((2, 5, 4, 3), (4, 3, 6), 2),
    "plain": ((2, 5, 6), (6, 7), 1),
    "one row": ((6,), (6, 7), 1),
}


def tensordot(x, kernel, contracted):
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=contracted)


def value_and_gradients(product, x, kernel, contracted):
    direction = jnp.asarray(np.random.default_rng(1).normal(size=jnp.shape(tensordot(x, kernel, contracted))), x.dtype)

    @jax.jit
    def run(x, kernel):
        y, back = jax.vjp(lambda x, kernel: product(x, kernel, contracted), x, kernel)
        return y, *back(direction)

    return run(x, kernel)


def case(name, dtype):
    rng = np.random.default_rng(0)
    x_shape, kernel_shape, contracted = SHAPES[name]
    return (
        jnp.asarray(rng.normal(size=x_shape), dtype),
        jnp.asarray(rng.normal(size=kernel_shape), jnp.float32),
        contracted,
    )


def test_gradients_by_hand():
    x, kernel = jnp.asarray([[2.0, 3.0]]), jnp.asarray([[1.0], [10.0]])
    y, back = jax.vjp(lambda x, kernel: _project(x, kernel, 1), x, kernel)
    d_x, d_kernel = back(jnp.asarray([[5.0]]))
    assert y.tolist() == [[32.0]]
    assert d_x.tolist() == [[5.0, 50.0]]
    assert d_kernel.tolist() == [[10.0], [15.0]]


@pytest.mark.parametrize("name", SHAPES)
def test_float32_equals_autodiff(name):
    for got, want in zip(
        value_and_gradients(_project, *case(name, jnp.float32)),
        value_and_gradients(tensordot, *case(name, jnp.float32)),
        strict=True,
    ):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_equals_autodiff_and_the_kernel_keeps_float32(name):
    """The kernel's gradient is nearer to the product in float32 than autodiff, which rounds it to bfloat16."""
    x, kernel, contracted = case(name, jnp.bfloat16)
    y, d_x, d_kernel = value_and_gradients(_project, x, kernel, contracted)
    plain_y, plain_d_x, plain_d_kernel = value_and_gradients(tensordot, x, kernel, contracted)
    np.testing.assert_array_equal(y, plain_y)
    assert d_x.dtype == jnp.bfloat16 and d_kernel.dtype == jnp.float32
    np.testing.assert_allclose(d_x.astype(jnp.float32), plain_d_x.astype(jnp.float32), rtol=0.01, atol=0.02)
    np.testing.assert_allclose(d_kernel, plain_d_kernel, rtol=0.01, atol=0.02)

    direction = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.bfloat16)
    rows = tuple(range(x.ndim - contracted))
    exact = np.tensordot(np.asarray(x, np.float32), np.asarray(direction, np.float32), axes=(rows, rows))
    np.testing.assert_allclose(d_kernel, exact, rtol=1e-5, atol=1e-5)


def test_jit_agrees():
    x, kernel, contracted = case("out of heads", jnp.float32)
    gradient = jax.grad(lambda x, kernel: jnp.sum(_project(x, kernel, contracted) ** 2), argnums=(0, 1))
    for a, b in zip(jax.jit(gradient)(x, kernel), gradient(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_merged_adapters_equal_narrow_products(name):
    """Values and the gradients of everything, of the kernel too, which is most often frozen."""
    x, kernel, contracted = case(name, jnp.float32)
    rng, rank = np.random.default_rng(2), 3
    a = jnp.asarray(rng.normal(size=(*kernel.shape[:contracted], rank)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(rank, *kernel.shape[contracted:])), jnp.float32)

    def narrow(x, kernel, a, b):
        return tensordot(x, kernel, contracted) + 0.7 * tensordot(tensordot(x, a, contracted), b, 1)

    def merged(x, kernel, a, b):
        return merged_product(x, kernel, a, b, 0.7, contracted)

    def run(product):
        def loss(*arguments):
            y = product(*arguments)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(x, kernel, a, b)

    chex.assert_trees_all_close(run(merged), run(narrow), rtol=1e-4, atol=1e-4)
