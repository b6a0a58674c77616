"""Cutting a batch into parts that run one after another, to save memory."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


def split(tree: Any, parts: int) -> Any:
    """Leaves ``[B, ...] -> [parts, B / parts, ...]``; part ``i`` takes rows ``i, i + parts, ...``.

    So each device cuts its own rows.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def in_parts(function: Callable[[Any], Result], parts: int) -> Callable[[Any], Result]:
    """The same function of a batch, computed in parts; what it returns has the rows of the batch, in their order."""
    if parts == 1:
        return function

    def whole(batch: Any) -> Result:
        results = jax.lax.map(function, split(batch, parts))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)

    return whole
