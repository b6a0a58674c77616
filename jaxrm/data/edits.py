"""Which tokens of a target response are copied from its source response, and which are edits."""

from collections.abc import Sequence

import numpy as np


def copied_tokens(target: Sequence[int] | np.ndarray, source: Sequence[int] | np.ndarray) -> np.ndarray:
    """The tokens of ``target`` that are in a longest common subsequence with ``source``.

    Of several such subsequences that one is taken whose tokens stand earliest in the target, as in
    `jaxrm.ops.edit_alignment.kept_tokens`.

    A row of the table of lengths is the bits of an integer, of which one addition makes the next row (Hyyrö 2004,
    "Bit-Parallel LCS-length Computation Revisited"). So ``n`` and ``m`` tokens take ``n m / 8`` bytes, 2 MB for 4,096
    each, and ``n`` additions of ``m`` bits.

    Args:
      target: ``[n]`` token ids.
      source: ``[m]`` token ids.

    Returns:
      bool ``[n]``.
    """
    ids = [int(token) for token in target]
    columns: dict[int, int] = {}
    for column, token in enumerate(source):
        columns[int(token)] = columns.get(int(token), 0) | 1 << column
    all_columns = (1 << len(source)) - 1
    # Bit j of a row is 0 where the subsequence with the first j + 1 tokens of the source is longer than with j.
    rows = [all_columns]
    for token in ids:
        matches = rows[-1] & columns.get(token, 0)
        rows.append(((rows[-1] + matches) | (rows[-1] - matches)) & all_columns)
    copied, usable = np.zeros(len(ids), bool), all_columns
    for i in reversed(range(len(ids))):
        if (rows[i + 1] & usable).bit_count() < (rows[i] & usable).bit_count():
            copied[i] = True
            # Its last partner leaves most of the source to the tokens before it.
            partner = (columns[ids[i]] & usable).bit_length() - 1
            usable = (1 << partner) - 1
    return copied
