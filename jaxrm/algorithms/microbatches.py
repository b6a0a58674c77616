"""Cutting a batch into microbatches that run one after another, to save memory."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


def split(tree: Any, num_microbatches: int) -> Any:
    """Leaves ``[B, ...] -> [N, B / N, ...]`` with N microbatches; microbatch ``i`` takes rows ``i, i + N, ...``."""
    # Rows i, i + N, ... and not a run of rows: so each device cuts its own rows, and none moves to another device.
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1), tree
    )


def merge(tree: Any) -> Any:
    """Leaves ``[N, B / N, ...] -> [B, ...]``, in the order that the rows had before `split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def in_microbatches(function: Callable[[Any], Result], num_microbatches: int) -> Callable[[Any], Result]:
    """The same function of a batch, computed in microbatches; its results have the rows of the batch, in order."""
    if num_microbatches == 1:
        return function

    def whole(batch: Any) -> Result:
        merged: Result = merge(jax.lax.map(function, split(batch, num_microbatches)))
        return merged

    return whole
