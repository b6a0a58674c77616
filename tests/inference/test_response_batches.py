"""Responses of many lengths in batches of few shapes: nothing lost, nothing twice, nothing moved."""

import jax
import numpy as np
import pytest

from jaxrm.errors import UserError
from jaxrm.inference.response_batches import response_batches
from jaxrm.sharding.mesh import MeshConfig, build_mesh

WIDTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@pytest.fixture(scope="module")
def one():
    return build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def eight():
    return build_mesh(MeshConfig(2, 2, 2))


def texts(seed, lengths):
    """Token ids from 1 on, so that a 0 in a batch is padding."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 1000, n).astype(np.int32) for n in lengths]


def read_back(batches):
    """What the masks of the batches leave, by index."""
    found = {}
    for batch, indices in batches:
        batch = jax.device_get(batch)
        for row, index in enumerate(indices):
            assert index not in found
            found[index] = (batch.prompts[row][batch.prompt_mask[row]], batch.responses[row][batch.response_mask[row]])
    return found


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_every_response_is_there_once_beside_its_own_prompt(one, rows):
    rng = np.random.default_rng(0)
    prompts, responses = texts(1, rng.integers(1, 300, 50)), texts(2, rng.integers(1, 300, 50))
    found = read_back(response_batches(prompts, responses, rows, one))
    assert sorted(found) == list(range(50))
    for index, (prompt, response) in found.items():
        np.testing.assert_array_equal(prompt, prompts[index])
        np.testing.assert_array_equal(response, responses[index])


def test_prompts_are_padded_left_and_responses_right(one):
    prompts, responses = texts(0, [3, 40, 17]), texts(1, [33, 2, 48])
    for batch, indices in response_batches(prompts, responses, 2, one):
        batch = jax.device_get(batch)
        for row, index in enumerate(indices):
            P, T = batch.prompts.shape[1], batch.responses.shape[1]
            missing = P - len(prompts[index])
            np.testing.assert_array_equal(batch.prompts[row], np.pad(prompts[index], (missing, 0)))
            np.testing.assert_array_equal(batch.prompt_mask[row], np.arange(P) >= missing)
            short = T - len(responses[index])
            np.testing.assert_array_equal(batch.responses[row], np.pad(responses[index], (0, short)))
            np.testing.assert_array_equal(batch.response_mask[row], np.arange(T) < len(responses[index]))
        assert batch.prompts.dtype == batch.responses.dtype == np.int32


def test_rows_left_over_are_empty(one):
    (batch, indices), *more = response_batches(texts(0, [4] * 3), texts(1, [5] * 3), 8, one)
    assert not more and sorted(indices) == [0, 1, 2]
    for array in jax.tree.leaves(jax.device_get(batch)):
        assert len(array) == 8 and not array[3:].any() and array[:3].any()


def test_no_responses_give_no_batches(one):
    assert list(response_batches([], [], 4, one)) == []


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[5], [6]], [[1]], r"2 prompts and 1 responses"),
        ([[5], [6]], [[1], []], r"^responses\[1\] has no token"),
        ([[], [6]], [[1], [1]], r"^prompts\[0\] has no token"),
        ([[5], [6]], [[1], [3, 10]], r"^responses\[1\] has token id 10, but ids of the model go from 0 to 9"),
        ([[5], [6, -1]], [[1], [3]], r"^prompts\[1\] has token id -1"),
    ],
)
def test_what_no_model_can_read_is_refused_before_any_batch(one, prompts, responses, message):
    with pytest.raises(UserError, match=message):
        response_batches(
            [np.array(x, np.int32) for x in prompts], [np.array(x, np.int32) for x in responses], 1, one, vocab_size=10
        )


@pytest.mark.parametrize(("rows", "expected"), [(1, 4), (4, 4), (6, 8)])
def test_rows_are_rounded_up_to_what_the_devices_share(eight, rows, expected):
    for batch, _ in response_batches(texts(0, [4] * 9), texts(1, [5] * 9), rows, eight):
        assert len(batch.prompts) == expected
        assert {shard.data.shape[0] for shard in batch.prompts.addressable_shards} == {expected // 4}


def test_devices_hold_what_one_device_holds(one, eight):
    prompts, responses = texts(0, range(1, 60, 5)), texts(1, range(60, 0, -5))
    pairs = zip(
        response_batches(prompts, responses, 4, one), response_batches(prompts, responses, 4, eight), strict=True
    )
    for (mine, my_indices), (theirs, their_indices) in pairs:
        assert my_indices == their_indices
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))


def test_batches_have_few_shapes_and_none_is_much_too_wide(one):
    """The width of a batch goes by its longest text."""
    rng = np.random.default_rng(3)
    prompts, responses = texts(4, rng.integers(1, 1000, 400)), texts(5, rng.integers(1, 700, 400))
    shapes = set()
    for batch, indices in response_batches(prompts, responses, 8, one):
        for array, of_row in ((batch.prompts, prompts), (batch.responses, responses)):
            width, longest = array.shape[1], max(len(of_row[i]) for i in indices)
            assert width in WIDTHS and longest <= width < max(1.5 * longest, 33)
        shapes.add((batch.prompts.shape[1], batch.responses.shape[1]))
    assert len(shapes) <= 40  # of 400 pairs of lengths


def test_responses_of_about_the_same_length_lie_together(one):
    """In the order they came, most of each row would be padding."""
    rng = np.random.default_rng(6)
    prompts, responses = texts(7, [8] * 200), texts(8, np.where(rng.random(200) < 0.1, 500, 20))
    masks = [batch.response_mask for batch, _ in response_batches(prompts, responses, 10, one)]
    held = sum(int(mask.sum()) for mask in masks)
    assert held == sum(map(len, responses))
    assert held > 0.6 * sum(mask.size for mask in masks)
