"""Blockwise attention, values and gradients, against plain softmax attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.models import blockwise

HEADS = {"multi-head": (4, 4), "grouped": (4, 2), "multi-query": (4, 1)}


def plain(query, key, value, segment_ids, scale, softcap, window):
    """Softmax over the whole row in float32, every query head beside its own copy of its key head."""
    N, K = query.shape[2], key.shape[2]
    key, value = (jnp.repeat(x.astype(jnp.float32), N // K, axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query.astype(jnp.float32), key) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    t = jnp.arange(query.shape[1])
    visible = t[:, None] >= t[None, :]
    if window is not None:
        visible &= t[None, :] > t[:, None] - window
    visible = visible[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def arrays(T, heads="grouped", dtype=jnp.float32, B=2, H=4, seed=0):
    """Query, key, value, and a direction of the output in which gradients are taken."""
    rng = np.random.default_rng(seed)
    N, K = HEADS[heads]
    return [jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (N, K, K, N)]


def segments(T, kind):
    if kind == "one":
        return jnp.ones((2, T), jnp.int32)
    if kind == "padded on the left":
        return jnp.asarray([[0] * (T // 3) + [1] * (T - T // 3), [1] * T])
    ends = (T // 4, T // 2 + 1, T - 2)  # three packed examples and padding, no boundary on that of a block
    return (
        jnp.tile(jnp.sum(jnp.arange(T)[:, None] >= jnp.asarray(ends)[None, :2], axis=1) + 1, (2, 1)).at[:, -2:].set(0)
    )


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8))
def value_and_gradients(attend, query, key, value, direction, segment_ids, scale, softcap, window):
    def along(*qkv):
        out = attend(*qkv, segment_ids, scale, softcap, window)
        return jnp.sum(out.astype(jnp.float32) * direction.astype(jnp.float32)), out

    (_, out), gradients = jax.value_and_grad(along, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks of four queries and at most three of them; no other test sees what was traced with these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "QUERY_BLOCK", 4)
        patch.setattr(blockwise, "MOST_BLOCKS", 3)
        yield
    jax.clear_caches()


def agree(T, heads="grouped", kinds=("packed",), softcap=None, window=None):
    for kind in kinds:
        case = (*arrays(T, heads), segments(T, kind), 0.4, softcap, window)
        got, want = value_and_gradients(blockwise.attend, *case), value_and_gradients(plain, *case)
        for name, a, b in zip(("output", "d query", "d key", "d value"), got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f"{name}, {kind}")


def test_two_tokens_by_hand():
    """Scores 0 and log 3 give the second token a quarter of the first value and three of its own."""
    query, key = jnp.ones((1, 2, 1, 1)), jnp.asarray([0.0, np.log(3.0)]).reshape(1, 2, 1, 1)
    value = jnp.asarray([4.0, 8.0]).reshape(1, 2, 1, 1)
    out = blockwise.attend(query, key, value, jnp.ones((1, 2), jnp.int32), 1.0, None, None)
    np.testing.assert_allclose(out.ravel(), [4.0, 7.0], rtol=1e-6)


def test_values_equal_a_numpy_loop():
    query, key, value, _ = arrays(11)
    rows = segments(11, "packed")
    got = jax.jit(lambda *qkv: blockwise.attend(*qkv, rows, 0.4, 2.0, 3))(query, key, value)
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    for b, t, n in np.ndindex(2, 11, 4):
        seen = [s for s in range(max(0, t - 2), t + 1) if rows[b, s] == rows[b, t]]
        weights = np.exp([2.0 * np.tanh(0.4 * float(q[b, t, n] @ k[b, s, n // 2]) / 2.0) for s in seen])
        want = sum(w * v[b, s, n // 2] for w, s in zip(weights, seen, strict=True)) / sum(weights)
        np.testing.assert_allclose(got[b, t, n], want, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
def test_heads_share_keys_and_values(heads):
    agree(14, heads)


@pytest.mark.parametrize("T", [1, 4, 6, 17])  # under a block, one, one and a rest, more than fit in three
def test_any_length(T):
    agree(T, kinds=["one"])


@pytest.mark.parametrize(
    ("softcap", "window"), [(None, None), (1.5, None), (None, 1), (1.5, 3), (None, 5), (1.5, 9), (None, 100)]
)
def test_windows_softcaps_and_segments(softcap, window):
    agree(11, kinds=["one", "packed", "padded on the left"], softcap=softcap, window=window)


def test_the_blocks_of_a_real_run(monkeypatch):
    """The constants as they are: two blocks and a rest, and a band that leaves the first one."""
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 128)
    monkeypatch.setattr(blockwise, "MOST_BLOCKS", 16)
    agree(300, window=150)


def test_a_long_row_takes_no_more_blocks_than_a_shorter_one():
    for T in (1, 3, 4, 5, 12, 13, 100):
        blocks = blockwise._blocks(T, window=None)
        assert len(blocks) <= blockwise.MOST_BLOCKS
        assert [rows.start for rows, _ in blocks] == [0, *(rows.stop for rows, _ in blocks[:-1])]
        assert blocks[-1][0].stop == T
        assert all(columns == slice(0, rows.stop) for rows, columns in blocks)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_bfloat16_stays_as_near_as_its_rounding(softcap):
    narrow = arrays(11, dtype=jnp.bfloat16)
    case = (segments(11, "packed"), 0.4, softcap, 9)
    got = value_and_gradients(blockwise.attend, *narrow, *case)
    want = value_and_gradients(plain, *(x.astype(jnp.float32) for x in narrow), *case)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        error = jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel())
        assert float(error) < 0.01  # bfloat16 has 8 bits: one rounding is up to 0.004


def test_huge_scores_stay_finite():
    query, key, value, direction = arrays(9)
    case = (500 * query, 500 * key, value, direction, segments(9, "packed"), 1.0, None, None)
    got, want = value_and_gradients(blockwise.attend, *case), value_and_gradients(plain, *case)
    assert all(np.isfinite(x).all() for x in got)
    np.testing.assert_allclose(got[0], want[0], atol=1e-4)


def test_other_segments_and_later_tokens_change_nothing():
    """Not even as NaN-making neighbours: they are replaced by what no exponential survives."""
    query, key, value, _ = arrays(14)
    rows = jnp.asarray([[1] * 6 + [2] * 6 + [0] * 2] * 2)
    attend = jax.jit(lambda *qkv: blockwise.attend(*qkv, rows, 0.4, None, None))
    clean = attend(query, key, value)
    changed = attend(*(x.at[:, 6:].set(1e6) for x in (query, key, value)))
    np.testing.assert_array_equal(changed[:, :6], clean[:, :6])
    changed = attend(*(x.at[:, :6].set(1e6) for x in (query, key, value)))
    np.testing.assert_array_equal(changed[:, 6:], clean[:, 6:])


def test_jit_agrees():
    query, key, value, _ = arrays(6)
    rows = segments(6, "one")
    eager = blockwise.attend(query, key, value, rows, 0.4, 1.5, 3)
    jitted = jax.jit(lambda *qkv: blockwise.attend(*qkv, rows, 0.4, 1.5, 3))(query, key, value)
    np.testing.assert_allclose(jitted, eager, atol=1e-6)
