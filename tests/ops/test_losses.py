"""Next-token targets against a hand-worked case and a NumPy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.ops.losses import next_token_targets


def packed_case(seed=0, B=6, T=12):
    """Rows of packed segments, some of them full, with a mask that also holds where it must not count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, (B, T)).astype(np.int32)
    segments = np.zeros((B, T), np.int32)
    for row in range(B):
        start = 0
        for segment, length in enumerate(rng.integers(1, 6, 3), 1):
            segments[row, start : start + length] = segment
            start += length
    segments[0] = 1
    return tokens, segments, rng.random((B, T)) < 0.7


def test_targets_by_hand():
    tokens = jnp.asarray([[5, 6, 7, 8, 9, 0]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    loss_mask = jnp.asarray([[False, False, True, True, True, True]])
    targets, mask = next_token_targets(tokens, segments, loss_mask)
    # 6 predicts 7 and 8 predicts 9; 7 does not predict 8, which opens the next example, and 9 predicts no padding
    assert mask.tolist() == [[False, True, False, True, False, False]]
    assert targets[mask].tolist() == [7, 9]


def test_targets_equal_a_numpy_loop():
    tokens, segments, loss_mask = packed_case()
    targets, mask = next_token_targets(*map(jnp.asarray, (tokens, segments, loss_mask)))
    for row in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            last = t + 1 == tokens.shape[1]
            counts = not last and segments[row, t] == segments[row, t + 1] != 0 and loss_mask[row, t + 1]
            assert bool(mask[row, t]) == counts, (row, t)
            if not last:
                assert int(targets[row, t]) == tokens[row, t + 1]


def test_every_trained_token_but_the_first_of_a_segment_is_a_target_once():
    tokens, segments, loss_mask = packed_case(1)
    first = np.diff(segments, axis=1, prepend=-1) != 0
    _, mask = next_token_targets(*map(jnp.asarray, (tokens, segments, loss_mask)))
    assert int(mask.sum()) == int((loss_mask & ~first & (segments > 0)).sum())


def test_the_last_position_never_wraps_round_to_the_first_token():
    tokens, segments = jnp.asarray([[1, 2, 3]]), jnp.ones((1, 3), jnp.int32)
    _, mask = next_token_targets(tokens, segments, jnp.ones((1, 3), bool))
    assert mask.tolist() == [[True, True, False]]


def test_padding_changes_nothing():
    tokens, segments, loss_mask = map(jnp.asarray, packed_case(2))
    targets, mask = next_token_targets(tokens, segments, loss_mask)
    wide = [
        jnp.pad(x, ((0, 0), (0, 4)), constant_values=fill) for x, fill in ((tokens, 9), (segments, 0), (loss_mask, 1))
    ]
    wide_targets, wide_mask = next_token_targets(*wide)
    np.testing.assert_array_equal(wide_mask[:, :12], mask)
    assert not wide_mask[:, 12:].any()
    np.testing.assert_array_equal(wide_targets[:, :11], targets[:, :11])


def test_jit_agrees():
    case = [jnp.asarray(x) for x in packed_case(3)]
    for a, b in zip(jax.jit(next_token_targets)(*case), next_token_targets(*case), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mask_of_numbers_or_of_another_shape_is_refused():
    tokens, segments, loss_mask = (jnp.asarray(x) for x in packed_case())
    with pytest.raises(AssertionError):
        next_token_targets(tokens, segments, loss_mask.astype(jnp.int32))
    with pytest.raises(AssertionError):
        next_token_targets(tokens, segments[:, :-1], loss_mask)
