"""Prompts with their responses in shared rows, so that short answers do not pay for long ones.

A row has room for the longest prompt and the longest answer. Where responses end early most of it is padding, which a
model reads all the same. So rows are packed (`jaxrm.data.packing`): a token sees its own prompt and response alone, and
losses are those of rows of their own but for rounding. The host plans it from the lengths, for each device and
microbatch by itself: all of them get as many rows, and no row moves to another device. The response tokens are put side
by side, and they alone meet the vocabulary.

The programs that read packed rows are compiled for each number of rows and of response tokens. These numbers are of a
ladder (`FRACTIONS`), so that there are few. They follow from the batch alone, so a run that goes on does the same.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm.algorithms.reading import lengths_of, row_width
from jaxrm.data.packing import pack
from jaxrm.types import ResponseBatch, RowPacking

FRACTIONS = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Of the rows and response tokens of a batch; each at most 1.5 times that before it (jaxrm choice)."""


def build_pack_rows(
    batch_sharding: NamedSharding, *, num_shards: int, num_microbatches: int = 1, pad_to_multiple_of: int = 1
) -> Callable[[ResponseBatch], ResponseBatch]:
    """``pack_rows(batch) -> batch`` with its `RowPacking`, or without where rows are full.

    It waits for the lengths of the batch, and is the same on all processes.

    Args:
      batch_sharding: of the rows.
      num_shards: devices, or groups of them, that rows are split over.
      num_microbatches: of the programs that read the batch.
      pad_to_multiple_of: see `jaxrm.algorithms.reading.response_hidden`.
    """
    replicated = NamedSharding(batch_sharding.mesh, PartitionSpec())
    lengths = jax.jit(lengths_of, in_shardings=(batch_sharding,), out_shardings=replicated)

    def pack_rows(batch: ResponseBatch) -> ResponseBatch:
        prompts, responses = (np.asarray(x) for x in lengths(batch))
        groups = groups_of(len(prompts), num_shards, num_microbatches)
        layout = plan_packing(batch, prompts, responses, groups, pad_to_multiple_of)
        if layout is None:
            return batch
        starts, num_rows, num_tokens = layout
        placed = jax.make_array_from_callback(starts.shape, batch_sharding, lambda index: starts[index])
        return dataclasses.replace(batch, packing=RowPacking(placed, num_shards, num_rows, num_tokens))

    return pack_rows


def plan_packing(
    batch: ResponseBatch, prompts: np.ndarray, responses: np.ndarray, groups: np.ndarray, pad_to_multiple_of: int
) -> tuple[np.ndarray, int, int] | None:
    """Where each prompt begins, and the rows and response tokens of a group, see `RowPacking`; None for full rows.

    Args:
      batch: whose shapes alone are read.
      prompts: ``[B]``, tokens of each prompt.
      responses: ``[B]``, of each response.
      groups: what is packed together, see `groups_of`.
      pad_to_multiple_of: see `build_pack_rows`.
    """
    starts, num_rows = plan_rows(prompts + responses, groups, row_width(batch, pad_to_multiple_of))
    most_rows, most_tokens = groups.shape[1], groups.shape[1] * batch.responses.shape[1]
    num_tokens = _rung(int(responses[groups].sum(axis=1).max()), most_tokens)
    num_tokens = -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of
    return None if num_rows == most_rows and num_tokens >= most_tokens else (starts, num_rows, num_tokens)


def groups_of(num_rows: int, num_shards: int, num_microbatches: int) -> np.ndarray:
    """Rows ``[groups, n]`` of a batch that are on one device in one microbatch (`jaxrm.algorithms.microbatches`)."""
    by_shard = np.arange(num_rows).reshape(num_shards, -1, num_microbatches)
    return by_shard.swapaxes(1, 2).reshape(num_shards * num_microbatches, -1)


def plan_rows(lengths: np.ndarray, groups: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """Where each prompt begins, ``[B]`` int32 as in `RowPacking`, and how many rows a group has.

    Args:
      lengths: ``[B]``, tokens of each prompt with its response.
      groups: ``[groups, n]``, what is packed together, see `groups_of`.
      width: of a row, no less than any of the lengths.
    """
    starts, most = np.zeros(len(lengths), np.int32), 1
    for group in groups:
        rows = pack(lengths[group].tolist(), width)
        most = max(most, len(rows))
        for number, row in enumerate(rows):
            members = group[row]
            starts[members] = number * width + np.cumsum(lengths[members]) - lengths[members]
    return starts, _rung(most, groups.shape[1])


def _rung(needed: int, most: int) -> int:
    """The least number of the ladder up to ``most`` that is no less than ``needed``."""
    return next(n for n in (math.ceil(fraction * most) for fraction in FRACTIONS) if n >= needed)
