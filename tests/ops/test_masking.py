"""Masked sums, means, whitening and last tokens against hand-worked cases and NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.ops import masking


def random_case(seed=0, shape=(4, 7)):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(rng.random(shape) < 0.6)


def test_sum_and_mean_by_hand():
    values = jnp.asarray([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = jnp.asarray([[True, False, True], [False, False, False]])
    assert float(masking.masked_sum(values, mask)) == 5.0
    assert float(masking.masked_mean(values, mask)) == 2.5
    assert masking.masked_sum(values, mask, axis=1).tolist() == [5.0, 0.0]
    assert masking.masked_mean(values, mask, axis=1).tolist() == [2.5, 0.0]
    assert masking.masked_mean(values, mask, axis=0).tolist() == [1.0, 0.0, 4.0]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_sums_and_means_equal_a_numpy_loop(axis):
    values, mask = random_case()
    lines = {None: [np.ndindex(4, 7)], 0: [[(i, j) for i in range(4)] for j in range(7)]}.get(
        axis, [[(i, j) for j in range(7)] for i in range(4)]
    )
    sums, means = [], []
    for line in lines:
        kept = [float(values[at]) for at in line if mask[at]]
        sums.append(sum(kept))
        means.append(sum(kept) / len(kept) if kept else 0.0)
    np.testing.assert_allclose(jnp.ravel(masking.masked_sum(values, mask, axis)), sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.ravel(masking.masked_mean(values, mask, axis)), means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [masking.masked_sum, masking.masked_mean])
def test_what_is_masked_changes_neither_value_nor_gradient(function):
    """Not even NaN and inf, which a product with the mask would let through."""
    values, mask = random_case(1)
    clean = jax.value_and_grad(function)(values, mask)
    for poison in (jnp.nan, jnp.inf, -1e30):
        value, gradient = jax.value_and_grad(function)(jnp.where(mask, values, poison), mask)
        assert float(value) == float(clean[0])
        np.testing.assert_array_equal(gradient, clean[1])
        assert (gradient[~mask] == 0).all()


def test_padding_changes_no_mean():
    values, mask = random_case(2)
    padded = masking.masked_mean(jnp.pad(values, ((0, 0), (0, 3))), jnp.pad(mask, ((0, 0), (0, 3))), axis=1)
    np.testing.assert_allclose(padded, masking.masked_mean(values, mask, axis=1), rtol=1e-6)


def test_an_empty_mask_gives_zero_and_a_zero_gradient():
    values = jnp.full((2, 3), jnp.nan)
    value, gradient = jax.value_and_grad(masking.masked_mean)(values, jnp.zeros((2, 3), bool))
    assert float(value) == 0.0
    assert (gradient == 0).all()


def test_bfloat16_adds_up_in_float32():
    """Past 256 a bfloat16 sum of ones would stand still; whole numbers count too."""
    values, mask = jnp.ones((1000,), jnp.bfloat16), jnp.arange(1000) < 999
    total = masking.masked_sum(values, mask)
    assert total.dtype == jnp.float32
    assert float(total) == 999.0
    assert float(masking.masked_mean(values > 0, mask)) == 1.0


@pytest.mark.parametrize("function", [masking.masked_sum, masking.masked_mean])
def test_jit_agrees(function):
    values, mask = random_case(3)
    compiled = jax.jit(function, static_argnames="axis")(values, mask, axis=1)
    np.testing.assert_allclose(compiled, function(values, mask, axis=1), rtol=1e-6)


def test_masks_of_numbers_or_of_another_shape_are_refused():
    values, mask = random_case(4)
    with pytest.raises(AssertionError):
        masking.masked_sum(values, mask.astype(jnp.float32))
    with pytest.raises(AssertionError):
        masking.masked_mean(values, mask[:, :1])


# --- whitening

whiten = jax.jit(masking.masked_whiten, static_argnames="shift_mean")


def test_whitening_by_hand():
    values = jnp.asarray([[0.5, 2.5, 99.0], [4.5, 99.0, 99.0]])
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    # mean 2.5, variance 8 / 3
    unit = 2 / np.sqrt(8 / 3)
    np.testing.assert_allclose(whiten(values, mask), [[-unit, 0, 0], [unit, 0, 0]], atol=1e-6)
    kept = [[2.5 - unit, 2.5, 0], [2.5 + unit, 0, 0]]
    np.testing.assert_allclose(whiten(values, mask, shift_mean=False), kept, atol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_a_numpy_loop(shift_mean):
    values, mask = random_case(5)
    values = 3.0 * values + 0.7
    kept = [float(values[at]) for at in np.ndindex(4, 7) if mask[at]]
    mean = sum(kept) / len(kept)
    deviation = (sum((x - mean) ** 2 for x in kept) / len(kept) + 1e-8) ** 0.5
    got = whiten(values, mask, shift_mean=shift_mean)
    assert got.dtype == jnp.float32
    for at in np.ndindex(4, 7):
        want = (float(values[at]) - mean) / deviation + (0.0 if shift_mean else mean)
        assert float(got[at]) == pytest.approx(want if mask[at] else 0.0, abs=1e-5), at


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_ignores_padding_and_gives_it_zero(shift_mean):
    values, mask = random_case(6)
    want = whiten(values, mask, shift_mean=shift_mean)
    wide_mask = jnp.pad(mask, ((0, 0), (0, 3)))
    for poison in (jnp.nan, jnp.inf, 1e30):
        wide = jnp.pad(jnp.where(mask, values, poison), ((0, 0), (0, 3)), constant_values=poison)
        got = whiten(wide, wide_mask, shift_mean=shift_mean)
        np.testing.assert_allclose(got[:, :7], want, atol=1e-6)
        assert (jnp.where(wide_mask, 0.0, got) == 0).all()


def test_whitening_is_blind_to_scale_and_offset():
    values, mask = random_case(7)
    np.testing.assert_allclose(whiten(5.0 * values - 2.0, mask), whiten(values, mask), atol=1e-5)


def test_one_token_none_or_equal_ones_whiten_to_their_mean():
    values, one = jnp.full((2, 3), 0.75), jnp.zeros((2, 3), bool).at[1, 0].set(True)
    for mask in (one, jnp.zeros((2, 3), bool), jnp.ones((2, 3), bool)):
        assert (whiten(values, mask) == 0).all()
        np.testing.assert_array_equal(whiten(values, mask, shift_mean=False), jnp.where(mask, 0.75, 0.0))


def test_whitening_jit_agrees():
    values, mask = random_case(8)
    np.testing.assert_allclose(whiten(values, mask), masking.masked_whiten(values, mask), atol=1e-6)


# --- last tokens


def test_last_tokens_by_hand():
    mask = jnp.asarray([[True, True, False], [False] * 3, [True] * 3, [True, False, False]])
    want = [[False, True, False], [False] * 3, [False, False, True], [True, False, False]]
    assert masking.last_token(mask).tolist() == want
    assert jax.jit(masking.last_token)(mask).tolist() == want


def test_padding_moves_no_last_token():
    """On the last token of the response and not on the first pad, however wide the batch is."""
    mask = jnp.asarray(np.arange(6) < np.asarray([[0], [1], [4], [6]]))
    last = masking.last_token(jnp.pad(mask, ((0, 0), (0, 5))))
    assert last.sum(axis=1).tolist() == [0, 1, 1, 1]
    assert last.argmax(axis=1).tolist() == [0, 0, 3, 5]


def test_last_tokens_refuse_a_mask_of_numbers_or_of_one_row():
    with pytest.raises(AssertionError):
        masking.last_token(jnp.ones((2, 3), jnp.int32))
    with pytest.raises(AssertionError):
        masking.last_token(jnp.ones((3,), bool))
