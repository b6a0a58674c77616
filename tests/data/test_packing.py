import numpy as np
import pytest

from jaxrm.data.examples import ComparisonExample, Example, MappingExample
from jaxrm.data.packing import build_row, pack

COLUMNS = {"loss_mask": np.dtype(bool)}


def example(tokens, targets=()):
    mask = np.zeros(len(tokens), bool)
    mask[list(targets)] = True
    return Example(np.array(tokens, np.int32), mask, "f:1")


def test_packing_puts_the_longest_first_where_it_fits_best():
    assert pack([4, 8, 1, 3, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert pack([], 10) == []
    assert pack([3], 3) == [[0]]


@pytest.mark.parametrize("seed", range(5))
def test_packing_uses_every_example_once_and_never_overfills(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, rng.integers(1, 400)).tolist()
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 1 or sum(length > 32 for length in lengths) > 0
    assert rows == pack(list(lengths), 64)


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(10, 400, 2000).tolist()
    assert sum(lengths) / (512 * len(pack(lengths, 512))) > 0.99


def test_packing_agrees_with_a_plain_search_for_the_fullest_row():
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths = rng.integers(1, 21, 40).tolist()
        rooms = []
        for length in sorted(lengths, reverse=True):
            fitting = [row for row, room in enumerate(rooms) if room >= length]
            if fitting:
                rooms[min(fitting, key=lambda row: rooms[row])] -= length
            else:
                rooms.append(20 - length)
        packed = pack(lengths, 20)
        assert sorted(20 - sum(lengths[i] for i in row) for row in packed) == sorted(rooms)


def test_a_row_keeps_its_examples_apart():
    row = build_row([example([5, 6, 7], [2]), example([8, 9], [1])], 8, 3, COLUMNS)
    expected = {
        "tokens": [5, 6, 7, 8, 9, 3, 3, 3],
        "segment_ids": [1, 1, 1, 2, 2, 0, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0, 0, 0],
        "loss_mask": [False, False, True, False, True, False, False, False],
    }
    for key, value in expected.items():
        np.testing.assert_array_equal(row[key], value)
    assert {key: value.dtype.name for key, value in row.items()} == {
        "tokens": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "loss_mask": "bool",
    }


def test_no_examples_make_a_row_of_padding():
    row = build_row([], 4, 0, COLUMNS)
    assert not row["segment_ids"].any()
    assert not row["loss_mask"].any()
    assert row["loss_mask"].dtype == bool


def test_a_row_of_mappings_says_which_targets_are_corrections():
    def mapping(tokens, is_correction):
        return MappingExample(np.array(tokens, np.int32), np.arange(len(tokens)) > 1, "f:1", is_correction)

    columns = {"loss_mask": np.dtype(bool), "is_correction": np.dtype(bool)}
    row = build_row([mapping([5, 6, 7], False), mapping([8, 9, 4, 2], True)], 8, 0, columns)
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 2, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert np.flatnonzero(row["loss_mask"]).tolist() == [2, 5, 6]
    assert np.flatnonzero(row["is_correction"]).tolist() == [5, 6]


def test_the_two_sides_of_a_comparison_are_segments_of_their_own():
    pairs = [
        ComparisonExample(np.arange(1, 6, dtype=np.int32), 2, "f:1"),
        ComparisonExample(np.array([7, 8]), 1, "f:2"),
    ]
    columns = {"is_chosen_end": np.dtype(bool), "rejected_offset": np.dtype(np.int32)}
    row = build_row(pairs, 9, 0, columns)
    expected = {
        "tokens": [1, 2, 3, 4, 5, 7, 8, 0, 0],
        "segment_ids": [1, 1, 2, 2, 2, 3, 4, 0, 0],
        "positions": [0, 1, 0, 1, 2, 0, 0, 0, 0],
        "is_chosen_end": [False, True, False, False, False, True, False, False, False],
        "rejected_offset": [0, 3, 0, 0, 0, 1, 0, 0, 0],
    }
    assert {name: values.tolist() for name, values in row.items()} == expected


def test_examples_that_do_not_fit_the_row_raise_value_error():
    with pytest.raises(AssertionError, match="fit in the row"):
        build_row([example([5, 6, 7]), example([8, 9])], 4, 0, COLUMNS)
