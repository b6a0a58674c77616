"""What PPO minimizes: the clipped surrogate of the policy and the clipped squared error of the values."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.ppo_state import PPOBatch
from jaxrm.algorithms.rollout import Networks
from jaxrm.algorithms.scoring import response_hidden, token_statistics
from jaxrm.algorithms.sft import sft_loss
from jaxrm.algorithms.train_step import LossFn
from jaxrm.ops import kl, losses, masking
from jaxrm.types import Rollout


def policy_loss(networks: Networks, config: PPOConfig) -> LossFn:
    """Loss of the policy: the clipped surrogate, with the optional terms of `PPOConfig`.

    Returns:
      ``loss_fn(params, PPOBatch, key)``. Aux: ``policy_loss``; means over response tokens, ``approx_kl`` (k3 of the new
      policy from the old), ``ratio_error`` (``|rho - 1|``), ``clip_fraction``, ``entropy``; ``kl_loss`` where the loss
      has one; ``ptx_loss``; and where the trunk is shared those of `critic_loss`.
    """

    def loss_fn(params: Any, batch: PPOBatch, key: jax.Array) -> Any:
        rollout, mask = batch.rollout, batch.rollout.responses.response_mask
        decoder, value_head = networks.open_policy(params)
        hidden = response_hidden(decoder, rollout.responses, pad_to_multiple_of=networks.pad_to_multiple_of)
        token = token_statistics(decoder, hidden, rollout.responses, temperature=networks.temperature)
        surrogate = losses.clipped_policy_loss(
            token.log_probs, rollout.log_probs, rollout.advantages, clip=config.clip, clip_high=config.clip_high
        )
        loss, (kl_coef, kl_estimator) = surrogate.loss, config.loss_kl
        if kl_coef:
            kl_loss = kl.kl_estimate(kl_estimator, token.log_probs, rollout.reference_log_probs)
            loss += kl_coef * kl_loss
        total, weight = losses.aggregate(loss, mask, config.loss_aggregation)
        policy_sum, _ = losses.aggregate(surrogate.loss, mask, config.loss_aggregation)

        approx_kl = jax.lax.stop_gradient(kl.kl_estimate("k3", rollout.log_probs, token.log_probs))
        observed = {
            "approx_kl": approx_kl,
            "ratio_error": jnp.abs(surrogate.ratio - 1.0),
            "clip_fraction": surrogate.is_clipped.astype(jnp.float32),
            "entropy": token.entropy,
        }
        tokens = jnp.sum(mask, dtype=jnp.float32)
        aux = {name: (masking.masked_sum(x, mask), tokens) for name, x in observed.items()}
        aux["policy_loss"] = (policy_sum, weight)
        if kl_coef:
            aux["kl_loss"] = losses.aggregate(kl_loss, mask, config.loss_aggregation)
        aux = jax.lax.stop_gradient(aux)
        if value_head is not None:
            value_sum, critic_aux = _value_terms(value_head(hidden), rollout, config)
            total, aux = total + config.value_coef * value_sum, aux | critic_aux
        if batch.ptx is not None and batch.ptx_weight is not None:
            (ptx_sum, ptx_tokens), _ = sft_loss(networks.decoder)(networks.decoder_params(params), batch.ptx, key)
            total += config.ptx_coef * batch.ptx_weight[0] * ptx_sum
            aux["ptx_loss"] = (jax.lax.stop_gradient(ptx_sum), ptx_tokens)
        return (total, weight), aux

    return loss_fn


def critic_loss(networks: Networks, config: PPOConfig) -> LossFn:
    """Loss of a critic with a trunk of its own: the clipped squared error of the values.

    Returns:
      ``loss_fn(params, PPOBatch, key)``. Aux: ``value_loss``, ``value_clip_fraction``.
    """

    def loss_fn(params: Any, batch: PPOBatch, key: jax.Array) -> Any:
        del key  # no dropout
        values = networks.values(params, batch.rollout.responses)
        total, aux = _value_terms(values, batch.rollout, config)
        return (total, aux["value_loss"][1]), aux

    return loss_fn


def _value_terms(values: jax.Array, rollout: Rollout, config: PPOConfig) -> tuple[jax.Array, Any]:
    mask = rollout.responses.response_mask
    assert rollout.values is not None and rollout.returns is not None, "values are trained where there are any"
    clipped = losses.clipped_value_loss(values, rollout.values, rollout.returns, clip=config.value_clip)
    total, weight = losses.aggregate(clipped.loss, mask, config.loss_aggregation)
    return total, {
        "value_loss": (jax.lax.stop_gradient(total), weight),
        "value_clip_fraction": (masking.masked_sum(clipped.is_clipped, mask), jnp.sum(mask, dtype=jnp.float32)),
    }
