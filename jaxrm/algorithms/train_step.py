"""The one builder of training steps: it alone knows about jit, donation and microbatches."""

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
# (params, batch, key) -> (loss_sum, weight), {name: (sum, weight)}; sums are float32 and not divided.
LossFn = Callable[[Any, Any, jax.Array], tuple[tuple[jax.Array, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]]


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
    on_devices = partition.on_devices(state_sharding.opt_state)
    is_offloaded = on_devices != state_sharding.opt_state

    def gradients(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        def total(params: Any) -> Any:
            (loss_sum, weight), aux = loss_fn(lora.join(frozen, params), batch, key)
            return loss_sum, {"loss": (loss_sum, weight), **aux}

        return jax.grad(total, has_aux=True)(params)

    def accumulated(params: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        shares = microbatches.split(batch, num_microbatches)
        keys = jax.random.split(key, num_microbatches)
        first = jax.tree.map(lambda x: x[0], (shares, keys))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, params, frozen, *first))

        def add(total: Any, microbatch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, frozen, *microbatch)), None

        return jax.lax.scan(add, zeros, (shares, keys))[0]

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        grads, sums = (accumulated if num_microbatches > 1 else gradients)(state.params, frozen, batch, key)
        # An empty batch has a zero gradient; a divisor that is not zero keeps it so.
        divisor = jnp.maximum(sums["loss"][1], 1e-8).astype(jnp.float32)
        grads = jax.tree.map(lambda g: g / divisor, grads)
        opt_state = state.opt_state
        if is_offloaded:  # the moments are on the devices only between these two copies
            opt_state = jax.device_put(opt_state, on_devices)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        if is_offloaded:
            opt_state = jax.device_put(opt_state, state_sharding.opt_state)
        params = optax.apply_updates(state.params, updates)
        # A metric of nothing, such as that of a mapping which the batch has none of, has no value.
        metrics = {name: jnp.where(weight > 0, total / weight, jnp.nan) for name, (total, weight) in sums.items()}
        metrics |= {
            "loss": sums["loss"][0] / divisor,
            "weight": sums["loss"][1],
            "grad_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    # Stated on both sides: left to the compiler, the new state may lie otherwise than the old one. Then its buffers
    # could not be reused, and the next step would compile again.
    return jax.jit(
        step,
        in_shardings=(state_sharding, dict(frozen_sharding), batch_sharding),
        out_shardings=(state_sharding, None),
        donate_argnums=0,
    )
