"""What PPO minimizes: the clipped surrogate of the policy and the clipped squared error of the values."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.ppo_state import PPOBatch
from jaxrm.algorithms.rollout import Networks
from jaxrm.algorithms.sft import sft_loss
from jaxrm.algorithms.train_step import LossFn, Sum
from jaxrm.ops import kl, losses, masking
from jaxrm.ops.vocab import TokenStatistics
from jaxrm.types import ResponseBatch, Rollout, TokenBatch


def policy_loss(networks: Networks, config: PPOConfig) -> LossFn:
    """Loss of the policy: the clipped surrogate, with the optional terms of `PPOConfig`.

    Returns:
      ``loss_fn(params, PPOBatch, key)``. Aux: ``policy_loss``; means over response tokens, ``approx_kl`` (k3 of the new
      policy from the old), ``ratio_error`` (``|rho - 1|``), ``clip_fraction``, ``entropy``; ``kl_loss`` where the loss
      has one; ``importance_weight`` and the share ``importance_capped`` where the loss is weighed; ``ptx_loss``; and
      where the trunk is shared those of `critic_loss`.
    """

    def loss_fn(params: Any, batch: PPOBatch, key: jax.Array) -> Any:
        return policy_sum(networks, config, params, networks.read_policy(params, batch.rollout.responses), batch, key)

    return loss_fn


def critic_loss(networks: Networks, config: PPOConfig) -> LossFn:
    """Loss of a critic with a trunk of its own: the clipped squared error of the values.

    Returns:
      ``loss_fn(params, PPOBatch, key)``. Aux: ``value_loss``, ``value_clip_fraction``.
    """

    def loss_fn(params: Any, batch: PPOBatch, key: jax.Array) -> Any:
        del key  # no dropout
        values = networks.values(params, batch.rollout.responses)
        return value_terms(values, batch.rollout, config)

    return loss_fn


def policy_sum(
    networks: Networks,
    config: PPOConfig,
    params: Any,
    reading: tuple[TokenStatistics, jax.Array | None],
    batch: PPOBatch,
    key: jax.Array,
) -> tuple[Sum, dict[str, Sum]]:
    """The policy's loss and its aux, see `policy_loss`.

    Args:
      networks: graphs of the models.
      config: options of PPO.
      params: of the policy.
      reading: what they say of the responses: statistics of tokens, and the values of a shared trunk, else None.
      batch: of the update.
      key: typed PRNG key.
    """
    token, values = reading
    (total, weight), aux = policy_terms(token, batch.rollout, config)
    if values is not None:
        (value_sum, _), value_aux = value_terms(values, batch.rollout, config)
        total, aux = total + config.value_coef * value_sum, aux | value_aux
    if batch.ptx is not None and batch.ptx_weight is not None:
        ptx_sum, aux["ptx_loss"] = ptx_terms(networks, params, batch.ptx, batch.ptx_weight, key)
        total += config.ptx_coef * ptx_sum
    return (total, weight), aux


def policy_terms(token: TokenStatistics, rollout: Rollout, config: PPOConfig) -> tuple[Sum, dict[str, Sum]]:
    """The policy's loss and its aux (see `policy_loss`), from what it says of each response token now."""
    mask = rollout.responses.response_mask
    # A mask over a loss does not protect its gradient: outside, where log-probs mean nothing, k3 would overflow.
    log_probs = jnp.where(mask, token.log_probs, rollout.log_probs)
    surrogate = losses.clipped_policy_loss(
        log_probs, rollout.log_probs, rollout.advantages, clip=config.clip, clip_high=config.clip_high
    )
    policy_loss, (kl_coef, kl_estimator) = surrogate.loss, config.loss_kl
    observed = {
        "approx_kl": kl.kl_estimate("k3", rollout.log_probs, log_probs),
        "ratio_error": jnp.abs(surrogate.ratio - 1.0),
        "clip_fraction": surrogate.is_clipped.astype(jnp.float32),
        "entropy": token.entropy,
    }
    if config.importance_cap is not None and rollout.sampler_log_probs is not None:
        weights = losses.importance_weights(rollout.log_probs, rollout.sampler_log_probs, config.importance_cap)
        policy_loss = weights * policy_loss
        observed |= {"importance_weight": weights, "importance_capped": weights >= config.importance_cap}
    tokens = jnp.sum(mask, dtype=jnp.float32)
    aux = {name: (masking.masked_sum(jax.lax.stop_gradient(x), mask), tokens) for name, x in observed.items()}
    aux["policy_loss"] = losses.aggregate(jax.lax.stop_gradient(policy_loss), mask, config.loss_aggregation)
    loss = policy_loss
    if kl_coef:
        kl_loss = kl.kl_estimate(kl_estimator, log_probs, rollout.reference_log_probs)
        aux["kl_loss"] = losses.aggregate(jax.lax.stop_gradient(kl_loss), mask, config.loss_aggregation)
        loss += kl_coef * kl_loss
    return losses.aggregate(loss, mask, config.loss_aggregation), aux


def value_terms(values: jax.Array, rollout: Rollout, config: PPOConfig) -> tuple[Sum, dict[str, Sum]]:
    """The critic's loss and its aux (see `critic_loss`), from its values now."""
    mask = rollout.responses.response_mask
    assert rollout.values is not None and rollout.returns is not None, "values are trained where there are any"
    clipped = losses.clipped_value_loss(values, rollout.values, rollout.returns, clip=config.value_clip)
    total, weight = losses.aggregate(clipped.loss, mask, config.loss_aggregation)
    return (total, weight), {
        "value_loss": (jax.lax.stop_gradient(total), weight),
        "value_clip_fraction": (masking.masked_sum(clipped.is_clipped, mask), jnp.sum(mask, dtype=jnp.float32)),
    }


def weigh_ptx(responses: ResponseBatch, ptx: TokenBatch, aggregation: str) -> jax.Array:
    """``ptx_weight`` of a batch; see `PPOBatch`."""
    weight = losses.aggregation_weight(responses.response_mask, aggregation)
    weight /= jnp.maximum(jnp.sum(ptx.loss_mask, dtype=jnp.float32), 1.0)
    return jnp.full((ptx.tokens.shape[0],), weight)


def ptx_terms(
    networks: Networks, params: Any, ptx: TokenBatch, ptx_weight: jax.Array, key: jax.Array
) -> tuple[jax.Array, Sum]:
    """The loss on SFT data as a share of the policy's sum (see `PPOBatch`), and its own sum and weight."""
    (ptx_sum, ptx_tokens), _ = sft_loss(networks.decoder)(networks.decoder_params(params), ptx, key)
    return ptx_weight[0] * ptx_sum, (jax.lax.stop_gradient(ptx_sum), ptx_tokens)
