"""Evaluation of a loss on held-out batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxrm.algorithms.train_step import LossFn


def build_eval_step(loss_fn: LossFn, *, params_sharding: Any, batch_sharding: Any) -> Callable[[Any, Any], Any]:
    """Jitted ``step(params, batch) -> {name: (sum, weight)}``: the sums of a loss and its metrics on one batch."""

    def step(params: Any, batch: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        total, aux = loss_fn(params, batch, jax.random.key(0))
        return {"loss": total, **aux}

    return jax.jit(step, in_shardings=(params_sharding, batch_sharding))


def evaluate(eval_step: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any]) -> dict[str, float]:
    """Mean of the loss and of each metric over all batches, each weighted by its own weight.

    Args:
      eval_step: from `build_eval_step`.
      params: parameters, already where the step wants them.
      batches: placed on the devices.

    Returns:
      ``{"eval_loss": ..., "eval_<metric>": ...}``, without those whose weight is 0 everywhere.
    """
    totals: dict[str, list[float]] = {}

    def add(sums: dict[str, tuple[jax.Array, jax.Array]]) -> None:
        for name, (total, weight) in jax.device_get(sums).items():
            so_far = totals.setdefault(name, [0.0, 0.0])
            so_far[0] += float(total)
            so_far[1] += float(weight)

    pending = None  # fetched while the next one runs; no more are in flight, since each waits for all devices
    for batch in batches:
        sums = eval_step(params, batch)
        if pending is not None:
            add(pending)
        pending = sums
    if pending is not None:
        add(pending)
    return {f"eval_{name}": total / weight for name, (total, weight) in totals.items() if weight > 0}
