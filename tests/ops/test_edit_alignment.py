"""Longest common subsequences of token ids, on devices and in NumPy, against a plain loop over all subsequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrm.data.edits import copied_tokens
from jaxrm.ops import edit_alignment

kept_tokens = jax.jit(edit_alignment.kept_tokens)
T, C = 9, 7


def kept(responses, others):
    """Rows of lists of ids, padded with ids that stand in the texts too."""

    def padded(rows, width):
        tokens, mask = np.full((len(rows), width), 1, np.int32), np.zeros((len(rows), width), bool)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return jnp.asarray(tokens), jnp.asarray(mask)

    return np.asarray(kept_tokens(*padded(responses, T), *padded(others, C)))


def longest(response, other, allowed, tail=()):
    """Length of the longest common subsequence of some of the allowed places and all of the tail, by trying each."""
    best = -1
    for n in range(len(allowed) + 1):
        for places in itertools.combinations(allowed, n):
            rest = iter(other)
            if all(response[i] in rest for i in (*places, *tail)):
                best = max(best, n + len(tail))
    return best


def test_kept_tokens_by_hand():
    """One replaced, one inserted, all moved, one repeated, nothing in common, nothing at all."""
    responses = [[5, 6, 7, 8], [5, 6, 7], [1, 2, 3], [4, 4, 4], [5, 5], [], [3]]
    others = [[5, 9, 7, 8], [5, 9, 6, 7], [3, 1, 2], [4, 4], [6, 7], [5], []]
    expected = [[1, 0, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0], [0, 0], [], [0]]
    for row, response, other, want in zip(kept(responses, others), responses, others, expected, strict=True):
        assert row.tolist() == [bool(x) for x in want] + [False] * (T - len(want))
        assert copied_tokens(response, other).tolist() == [bool(x) for x in want]


def test_padding_changes_nothing():
    """Neither more columns nor what stands in them."""
    rng = np.random.default_rng(0)
    mask, other_mask = np.arange(6) < np.array([[6], [3], [0]]), np.arange(5) < np.array([[2], [5], [4]])
    ids, others = rng.integers(0, 3, (3, 6)), rng.integers(0, 3, (3, 5))
    want = np.asarray(edit_alignment.kept_tokens(*map(jnp.asarray, (ids, mask, others, other_mask))))
    junk = np.where(mask, ids, 2), np.where(other_mask, others, 1)
    wide = [np.pad(x, ((0, 1), (0, 3))) for x in (junk[0], mask, junk[1], other_mask)]
    got = np.asarray(edit_alignment.kept_tokens(*map(jnp.asarray, wide)))
    np.testing.assert_array_equal(got[:3, :6], want)
    assert not got[3].any() and not got[:, 6:].any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=T), min_size=4, max_size=4),
    st.lists(st.lists(st.integers(0, 3), max_size=C), min_size=4, max_size=4),
)
def test_kept_tokens_are_those_of_a_loop(responses, others):
    """As many as the longest has, and of several the one that stands earliest from the last token on."""
    for row, response, other in zip(kept(responses, others), responses, others, strict=True):
        places = np.flatnonzero(row).tolist()
        assert copied_tokens(response, other).tolist() == row[: len(response)].tolist()
        best = longest(response, other, range(len(response)))
        assert len(places) == best
        rest = iter(other)
        assert all(response[i] in rest for i in places)
        # Every token that could be left out, from the last one on, is.
        for i in reversed(range(len(response))):
            tail = [j for j in places if j > i]
            if i in places:
                assert longest(response, other, range(i), tail) < best
