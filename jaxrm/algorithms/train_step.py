"""The one builder of training steps: it alone knows about jit, donation and microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrm.algorithms import microbatches
from jaxrm.algorithms.state import TrainState
from jaxrm.runtime import partition

Metrics = dict[str, jax.Array]
# (params, batch, key) -> (loss_sum, weight), {name: (sum, weight)}; sums are float32 and not divided.
LossFn = Callable[[Any, Any, jax.Array], tuple[tuple[jax.Array, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]]


def build_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    state_sharding: Any,
    batch_sharding: Any,
    num_microbatches: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Jitted ``step(state, batch) -> (state, metrics)`` that minimizes ``loss_sum / weight`` of the whole batch.

    Gradients of the sum and the weights are added over microbatches and devices and divided once, so a batch gives
    the same update however it is cut, even where its parts carry different numbers of tokens.

    Args:
      loss_fn: ``(params, batch, key) -> (loss_sum, weight), aux``; aux maps a metric to its own (sum, weight).
      optimizer: from `jaxrm.runtime.optimizer`.
      state_sharding: pytree of shardings like the state. The state is donated: its buffers are reused. What of the
        optimizer's lies in the memory of the hosts is on the devices only while they update.
      batch_sharding: sharding of the rows of a batch, or a pytree of them.
      num_microbatches: parts that the rows are cut into, one after another; divides the rows of every device.

    Returns:
      The step. Its metrics are float32 scalars: ``loss``, ``weight`` (the divisor, e.g. tokens), ``grad_norm``
      before clipping, and each metric of aux, NaN where its weight is 0.
    """

    def gradients(params: Any, batch: Any, key: jax.Array) -> Any:
        def total(params: Any) -> Any:
            (loss_sum, weight), aux = loss_fn(params, batch, key)
            return loss_sum, {"loss": (loss_sum, weight), **aux}

        return jax.grad(total, has_aux=True)(params)

    def accumulated(params: Any, batch: Any, key: jax.Array) -> Any:
        parts = microbatches.split(batch, num_microbatches)
        keys = jax.random.split(key, num_microbatches)
        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, params, *first))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, *part)), None

        return jax.lax.scan(add, zeros, (parts, keys))[0]

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, sums = (accumulated if num_microbatches > 1 else gradients)(state.params, batch, key)
        # An empty batch has a zero gradient; a divisor that is not zero keeps it so.
        divisor = jnp.maximum(sums["loss"][1], 1e-8).astype(jnp.float32)
        grads = jax.tree.map(lambda g: g / divisor, grads)
        if partition.on_devices(state_sharding.opt_state) == state_sharding.opt_state:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        else:
            params, opt_state = _offloaded_update(optimizer, grads, state, state_sharding.opt_state)
        # A metric of nothing, such as that of a mapping which the batch has none of, has no value.
        metrics = {name: jnp.where(weight > 0, total / weight, jnp.nan) for name, (total, weight) in sums.items()}
        metrics |= {
            "loss": sums["loss"][0] / divisor,
            "weight": sums["loss"][1],
            "grad_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return jax.jit(
        step,
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, None),
        donate_argnums=0,
    )


def _offloaded_update(
    optimizer: optax.GradientTransformation, grads: Any, state: TrainState, sharding: Any
) -> tuple[Any, Any]:
    """New parameters and optimizer state where the moments lie in the memory of the hosts.

    One parameter after another: its moments are fetched once the one before has been updated, so that the devices hold
    those of a parameter or two at a time, and none before the gradients are there.

    Args:
      optimizer: updates each parameter by itself, but for what it takes from the gradients of all, like their norm.
      grads: of the parameters.
      state: before the update.
      sharding: of its ``opt_state``.
    """
    old, shape = jax.tree.flatten(state.params)
    numbers = jax.tree.unflatten(shape, range(len(old)))
    owners = optax.tree_utils.tree_map_params(
        optimizer, lambda _, number: number, state.opt_state, numbers, transform_non_params=lambda _: -1
    )
    owner = jax.tree.leaves(owners)  # of each array of the state, the number of its parameter
    held, structure = jax.tree.flatten(state.opt_state)
    away, near = jax.tree.leaves(sharding), jax.tree.leaves(partition.on_devices(sharding))
    params, opt_state = list(old), list(held)
    before: Any = grads
    for i in range(len(old)):
        mine = [j for j in range(len(held)) if owner[j] == i and away[j] != near[j]]
        fetched, _ = jax.lax.optimization_barrier(([held[j] for j in mine], before))
        # The others are not looked at: what would become of them is no output, so nothing computes it.
        given = [x if away[j] == near[j] else jnp.zeros(x.shape, x.dtype) for j, x in enumerate(held)]
        for j, x in zip(mine, fetched, strict=True):
            given[j] = jax.device_put(x, near[j])
        updates, after = optimizer.update(grads, jax.tree.unflatten(structure, given), state.params)
        params[i] = before = optax.apply_updates(old[i], jax.tree.leaves(updates)[i])
        for j, x in enumerate(jax.tree.leaves(after)):
            if owner[j] in (-1, i):
                opt_state[j] = x if away[j] == near[j] else jax.device_put(x, away[j])
    return jax.tree.unflatten(shape, params), jax.tree.unflatten(structure, opt_state)
