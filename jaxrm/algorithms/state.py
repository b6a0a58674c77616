"""What a training step takes and gives back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters under training and the optimizer's memory of them; also a tree of shapes or shardings of the same.

    Attributes:
      step: ``[]`` int32, number of updates made.
      params: pytree of parameters, float32.
      opt_state: state of the optimizer.
      key: typed PRNG key of the run; the randomness of a step is ``fold_in(key, step)``, so that a resumed run
        draws what an unbroken one would have drawn.
    """

    step: Any
    params: Any
    opt_state: Any
    key: Any


def create(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)
