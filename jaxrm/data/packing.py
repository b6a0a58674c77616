"""Several examples in one row, kept apart by segment ids, so that few tokens are padding."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

import numpy as np

from jaxrm.data.examples import TokenExample

Row = dict[str, np.ndarray]


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: which examples share a row. Deterministic.

    The longest example goes first, each into the fullest row that still has room for it (Johnson 1974; never more
    than 11/9 of the fewest possible rows, plus one).

    Args:
      lengths: tokens in each example, from 1 to `row_length`.
      row_length: tokens in a row.

    Returns:
      For each row, the indices of its examples.
    """
    assert all(0 < length <= row_length for length in lengths), "examples are no longer than a row"
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the sorted keys of rows_by_room
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        position = bisect_left(rooms, lengths[index])
        if position == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, row_length
        else:
            room = rooms[position]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[position]
        rows[row].append(index)
        room -= lengths[index]
        if room:
            if room not in rows_by_room:
                insort(rooms, room)
            rows_by_room.setdefault(room, []).append(row)
    return rows


def build_row(examples: Sequence[TokenExample], row_length: int, pad_id: int, columns: Mapping[str, np.dtype]) -> Row:
    """One row of a batch from the examples that share it; none of them gives an empty row.

    Args:
      examples: no longer than the row together.
      row_length: T.
      pad_id: what the tokens are filled up with.
      columns: name and type of each of the examples' columns.

    Returns:
      tokens: int32 `[T]`.
      segment_ids: int32 `[T]`, 1, 2, … per segment and 0 on padding.
      positions: int32 `[T]`, from 0 in every segment.
      and each column `[T]`, 0 or False on padding.
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
