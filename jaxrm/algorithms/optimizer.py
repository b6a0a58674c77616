"""The optimizer, from optax."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrm.config.fields import above, at_least, at_most, below, bounded, check, finite, one_of

_DECAYED = ("kernel", "embedding", "lora_a", "lora_b")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping.

    Attributes:
      name: ``adamw``, or ``adafactor`` (factored second moment and no first, far less memory; it has no use for
        ``b1``, ``b2``, ``eps`` and ``moment_dtype``).
      lr: peak learning rate.
      schedule: after the warm-up ``cosine`` or ``linear`` to ``final_lr_share`` of the peak, or ``constant``.
      warmup: share of the steps over which the rate rises linearly; the first has 1 / (their number) of ``lr``.
      final_lr_share: rate that the schedule reaches when the last step is done, as a share of ``lr``.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled; on kernels, embeddings and adapters, never on norms and biases.
      clip_norm: largest global norm of the gradients, or None for no clipping.
      moment_dtype: of the first moment, ``float32`` or ``bfloat16``. The second stays in float32: at b2 near 1
        its updates are smaller than the spacing of bfloat16 and it would never move (jaxrm choice).
      offload: keep the moments in the memory of the hosts between updates, which gives their room to what runs in
        between: rollouts and the other model's update in PPO. The update itself needs no less room, and each one sends
        them over and back; nothing that is learned changes.
    """

    name: str = bounded("adamw", one_of("adamw", "adafactor"))
    lr: float = bounded(2e-5, above(0), finite)
    schedule: str = bounded("cosine", one_of("cosine", "linear", "constant"))
    warmup: float = bounded(0.03, at_least(0), below(1), meaning=", a share of the steps")
    final_lr_share: float = bounded(0.0, at_least(0), at_most(1), meaning=", a share of lr")
    b1: float = bounded(0.9, at_least(0), below(1))
    b2: float = bounded(0.95, at_least(0), below(1))
    eps: float = bounded(1e-8, above(0))
    weight_decay: float = bounded(0.0, at_least(0), finite)
    clip_norm: float | None = bounded(1.0, above(0), meaning="no clipping")
    moment_dtype: str = bounded("float32", one_of("float32", "bfloat16"))
    offload: bool = False

    def __post_init__(self) -> None:
        check(self)


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, over ``num_steps`` in all."""
    warmup = round(config.warmup * num_steps)
    rest = max(num_steps - warmup, 1)
    final = config.lr * config.final_lr_share
    decay = {
        "cosine": optax.cosine_decay_schedule(config.lr, rest, alpha=config.final_lr_share),
        "linear": optax.linear_schedule(config.lr, final, rest),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    if warmup == 0:
        return decay
    # The first step is 1 / warmup of the peak, not 0: no step is spent on nothing.
    rise = optax.linear_schedule(config.lr / warmup, config.lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def build_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW (Loshchilov & Hutter, arXiv 1711.05101) or Adafactor (arXiv 1804.04235)."""
    schedule = learning_rate(config, num_steps)
    if config.name == "adamw":
        update = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            mu_dtype=jnp.dtype(config.moment_dtype),
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    else:
        # Its own decay would shrink the weights by the whole of weight_decay at every step, whatever the rate.
        update = optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(schedule, flip_sign=False),
        )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, update)


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to: kernels, embeddings and adapters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)
