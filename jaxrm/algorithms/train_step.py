"""The one builder of training steps of one loss; and what a step is made of: gradients over microbatches, updates."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrm.algorithms import microbatches
from jaxrm.algorithms.state import TrainState
from jaxrm.models import lora
from jaxrm.sharding import partition

Metrics = dict[str, jax.Array]
Sum = tuple[jax.Array, jax.Array]
"""A sum, float32 and not divided, and its weight."""
# (params, batch, key) -> (loss_sum, weight), {name: (sum, weight)}
LossFn = Callable[[Any, Any, jax.Array], tuple[Sum, dict[str, Sum]]]


def build_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    state_sharding: Any,
    batch_sharding: Any,
    frozen_sharding: Any = MappingProxyType({}),
    num_microbatches: int = 1,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """Jitted ``step(state, frozen, batch) -> (state, metrics)`` that minimizes ``loss_sum / weight`` of the batch.

    Gradients of the sum and the weights are added over microbatches and devices and divided once, so a batch gives
    the same update however it is cut, even where its microbatches carry different numbers of tokens.

    The loss takes the parameters of the state joined with the frozen ones (`jaxrm.models.lora.join`). Frozen ones have
    no gradient and no moments, and are neither donated nor copied; ``{}`` where all are trained.

    Args:
      loss_fn: ``(params, batch, key) -> (loss_sum, weight), aux``; aux maps a metric to its own (sum, weight).
      optimizer: from `jaxrm.algorithms.optimizer`.
      state_sharding: pytree of shardings like the state. The state is donated: its buffers are reused. Moments that
        lie in the memory of the hosts are on the devices only during the update.
      batch_sharding: sharding of the rows of a batch, or a pytree of them.
      frozen_sharding: pytree of shardings like the frozen parameters.
      num_microbatches: shares of the rows, one after another; divides the rows of every device.

    Returns:
      The step. Its metrics are float32 scalars: ``loss``, ``weight`` (the divisor, e.g. tokens), ``grad_norm``
      before clipping, and each metric of aux, NaN where its weight is 0.
    """
    apply = build_apply(optimizer, state_sharding)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        def total(params: Any, batch: Any, key: jax.Array) -> Any:
            (loss_sum, weight), aux = loss_fn(lora.join(frozen, params), batch, key)
            return loss_sum, ({"loss": (loss_sum, weight), **aux}, ())

        key = jax.random.fold_in(state.key, state.step)
        grads, sums, _ = accumulated(total, state.params, batch, key, num_microbatches)
        state, metrics = apply(state, grads, sums.pop("loss"))
        return state, means(sums) | metrics

    # Stated on both sides: left to the compiler, the new state may lie otherwise than the old one. Then its buffers
    # could not be reused, and the next step would compile again.
    return jax.jit(
        step,
        in_shardings=(state_sharding, dict(frozen_sharding), batch_sharding),
        out_shardings=(state_sharding, None),
        donate_argnums=0,
    )


def accumulated(
    total: Callable[[Any, Any, jax.Array], Any], params: Any, batch: Any, key: jax.Array, num_microbatches: int
) -> tuple[Any, Any, Any]:
    """Gradients and sums, added over microbatches, and rows in the order of the batch.

    ``total(params, batch, key) -> loss_sum, (sums, rows)``.
    """
    gradients = jax.grad(total, has_aux=True)
    if num_microbatches == 1:
        grads, (sums, rows) = gradients(params, batch, key)
        return grads, sums, rows
    shares = microbatches.split(batch, num_microbatches)
    keys = jax.random.split(key, num_microbatches)
    first = jax.tree.map(lambda x: x[0], (shares, keys))
    grads, (sums, _) = jax.eval_shape(gradients, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, sums))

    def add(carry: Any, microbatch: Any) -> tuple[Any, Any]:
        grads, (sums, rows) = gradients(params, *microbatch)
        return jax.tree.map(jnp.add, carry, (grads, sums)), rows

    (grads, sums), rows = jax.lax.scan(add, zeros, (shares, keys))
    return grads, sums, microbatches.merge(rows)


def build_apply(
    optimizer: optax.GradientTransformation, state_sharding: Any
) -> Callable[[TrainState, Any, Sum], tuple[TrainState, Metrics]]:
    """``apply(state, gradients of the sum, (loss_sum, weight)) -> state, metrics``."""
    on_devices = partition.on_devices(state_sharding.opt_state)
    is_offloaded = on_devices != state_sharding.opt_state

    def apply(state: TrainState, grads: Any, loss: Sum) -> tuple[TrainState, Metrics]:
        # An empty batch has a zero gradient; a divisor that is not zero keeps it so.
        divisor = jnp.maximum(loss[1], 1e-8).astype(jnp.float32)
        grads = jax.tree.map(lambda g: g / divisor, grads)
        opt_state = state.opt_state
        if is_offloaded:  # the moments are on the devices only between these two copies
            opt_state = jax.device_put(opt_state, on_devices)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        if is_offloaded:
            opt_state = jax.device_put(opt_state, state_sharding.opt_state)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss[0] / divisor, "weight": loss[1], "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return apply


def means(sums: dict[str, Sum]) -> Metrics:
    """Metrics of their sums and weights."""
    # A metric of nothing, such as that of a mapping which the batch has none of, has no value.
    return {name: jnp.where(weight > 0, total / weight, jnp.nan) for name, (total, weight) in sums.items()}
