"""Several examples in one row, separated by segment ids, so that few tokens are padding."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

import numpy as np

from jaxrm.data.examples import TokenExample

Row = dict[str, np.ndarray]


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: which examples share a row. Deterministic.

    The longest example goes first, each into the fullest row with enough free tokens. The result has at most 11/9 of
    the fewest possible rows, plus one (Johnson 1974).

    Args:
      lengths: tokens in each example, from 1 to ``row_length``.
      row_length: tokens in a row.

    Returns:
      For each row, the indices of its examples.
    """
    assert all(0 < length <= row_length for length in lengths), "examples are no longer than a row"
    rows: list[list[int]] = []
    rows_by_free: dict[int, list[int]] = {}
    free_counts: list[int] = []  # the sorted keys of rows_by_free
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        position = bisect_left(free_counts, lengths[index])
        if position == len(free_counts):
            rows.append([])
            row, free = len(rows) - 1, row_length
        else:
            free = free_counts[position]
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                del rows_by_free[free], free_counts[position]
        rows[row].append(index)
        free -= lengths[index]
        if free:
            if free not in rows_by_free:
                insort(free_counts, free)
            rows_by_free.setdefault(free, []).append(row)
    return rows


def build_row(examples: Sequence[TokenExample], row_length: int, pad_id: int, columns: Mapping[str, np.dtype]) -> Row:
    """One row of a batch from the examples that share it. No example gives an empty row.

    Args:
      examples: together no longer than the row.
      row_length: T.
      pad_id: the token of padding.
      columns: name and type of each of the examples' columns.

    Returns:
      A dict of arrays: ``tokens`` int32 ``[T]``; ``segment_ids`` int32 ``[T]``, 1, 2, … per segment and 0 on padding;
      ``positions`` int32 ``[T]``, from 0 in every segment; and each column ``[T]``, 0 or False on padding.
    """
    row = {
        "tokens": np.full(row_length, pad_id, np.int32),
        "segment_ids": np.zeros(row_length, np.int32),
        "positions": np.zeros(row_length, np.int32),
        **{name: np.zeros(row_length, dtype) for name, dtype in columns.items()},
    }
    start, segment = 0, 0
    for example in examples:
        stop = start + len(example.tokens)
        assert stop <= row_length, "examples fit in the row"
        row["tokens"][start:stop] = example.tokens
        for name, values in example.columns().items():
            row[name][start:stop] = values
        for length in example.segment_lengths:
            segment += 1
            row["segment_ids"][start : start + length] = segment
            row["positions"][start : start + length] = np.arange(length)
            start += length
        assert start == stop, "segments make up the example"
    return row
