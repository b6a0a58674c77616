"""A training step of one's own on a loaded model: its losses, its first state, its jitted step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrm.algorithms.state import TrainState, create
from jaxrm.algorithms.train_step import LossFn, Metrics, build_train_step
from jaxrm.errors import UserError, arguments
from jaxrm.inference.policy import Policy
from jaxrm.inference.prompts import check_count
from jaxrm.inference.reward_model import RewardModel
from jaxrm.inference.sharded_model import state_shardings
from jaxrm.models import lora
from jaxrm.sharding import partition


@arguments()
def build_training(
    model: Policy | RewardModel,
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    num_microbatches: int = 1,
) -> tuple[TrainState, Callable[[TrainState, Any], tuple[TrainState, Metrics]]]:
    """First state of a training, and its jitted step.

    The state has a copy of the model's parameters, so that the model stays as it is. The trained one is
    ``model.with_params(state.params)``. Of a model with adapters those alone are copied and trained.

    Args:
      model: what is trained.
      loss: from `jaxrm.losses`, or one of your own: ``(params, batch, key) -> (sum, weight), {name: (sum, weight)}``.
      optimizer: any of optax.
      seed: of the step's own randomness, ``fold_in(key, step)``.
      num_microbatches: parts that a batch is cut into, to save memory; the update is the same.

    Returns:
      ``state`` and ``step(state, batch) -> (state, metrics)``. The step takes the state's memory over: use the one that
      it returns. Metrics are float32 scalars, among them ``loss`` and ``grad_norm``.

    Raises:
      UserError: the model's weights are quantized, and it has no adapters.
    """
    check_count("num_microbatches", num_microbatches)
    check_count("seed", seed, 0)
    sharded = model.model
    if sharded.source.quantize is not None and not sharded.lora.is_on:
        raise UserError(
            f"the weights of {model.name} are {sharded.source.quantize}, which cannot be trained; train adapters on "
            f"them, model.with_adapters(), or load the model without quantize={sharded.source.quantize!r}"
        )
    shardings = state_shardings(sharded, optimizer, sharded.mesh)
    start = jax.jit(lambda params, key: create(params, optimizer, key), out_shardings=shardings, donate_argnums=0)
    trained, frozen = lora.split(model.params)
    state = start(jax.tree.map(jnp.copy, trained), jax.random.key(seed))
    step = build_train_step(
        loss,
        optimizer,
        state_sharding=shardings,
        batch_sharding=partition.batch_sharding(sharded.mesh),
        frozen_sharding=sharded.frozen_shardings,
        num_microbatches=num_microbatches,
    )
    return state, lambda state, batch: step(state, frozen, batch)
