"""PPO's update where it is the only one of its rollout: policy and critic are read once.

The log-probs of the update are then those that the responses were drawn with, and its values those before it. So
rewards, advantages and losses follow from one forward, and only the first two have no gradient. The ratio of new to old
probabilities is 1 by construction. `jaxrm.algorithms.ppo_config.is_one_pass` says where this holds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrm.algorithms import ppo_loss
from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.ppo_state import PPOBatch, RewardAndKLState
from jaxrm.algorithms.rollout import Networks, TokenLogProbs
from jaxrm.algorithms.state import TrainState
from jaxrm.algorithms.train_step import Metrics, Sum, accumulated, build_apply, means
from jaxrm.models import lora
from jaxrm.types import ResponseBatch, Rollout, TokenBatch, TokenRewards

Estimate = Callable[
    [RewardAndKLState, ResponseBatch, TokenLogProbs, TokenRewards], tuple[Rollout, RewardAndKLState, Metrics]
]
"""`jaxrm.algorithms.ppo.estimate` with its options."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnePassBatch:
    """Batch of an update that is the only one of its rollout.

    Attributes:
      responses: prompts and responses.
      reference_log_probs: ``[B, T]`` float32.
      rewards: of the reward source.
      sampler_log_probs: see `TokenLogProbs`.
      ptx: rows of SFT data, or None.
      ptx_weight: as in `jaxrm.algorithms.ppo_state.PPOBatch`; the step fills it in.
      advantages: ``[B, T]`` float32, where they need no log-probs; the step fills them in.
    """

    responses: ResponseBatch
    reference_log_probs: jax.Array
    rewards: TokenRewards
    sampler_log_probs: jax.Array | None = None
    ptx: TokenBatch | None = None
    ptx_weight: jax.Array | None = None
    advantages: jax.Array | None = None


def build_one_pass_step(
    networks: Networks,
    config: PPOConfig,
    estimate: Estimate,
    models: dict[str, tuple[optax.GradientTransformation, Any]],
    *,
    base_sharding: Any,
    feedback_sharding: Any,
    batch_sharding: Any,
    num_microbatches: int = 1,
) -> Callable[[dict[str, TrainState], Any, RewardAndKLState, OnePassBatch], Any]:
    """Jitted ``step(states, base, feedback, batch) -> (states, feedback, metrics of the rollout, metrics by model)``.

    Each model is trained as by `jaxrm.algorithms.train_step.build_train_step`, on one backward pass through the losses
    of both. Metrics of their aux are among those of the policy.

    Args:
      networks: graphs of the models.
      config: options of PPO.
      estimate: from token rewards to advantages.
      models: optimizer of ``policy``, and of ``critic`` where it has a trunk of its own, and the sharding of its state,
        which is donated.
      base_sharding: of the frozen parameters, which the models share; ``{}`` where all are trained.
      feedback_sharding: of the `RewardAndKLState`.
      batch_sharding: of the rows.
      num_microbatches: see `jaxrm.algorithms.train_step.build_train_step`.
    """
    assert num_microbatches == 1 or not config.reads_log_probs, "advantages are of a whole batch"
    applies = {name: build_apply(optimizer, sharding) for name, (optimizer, sharding) in models.items()}
    state_shardings = {name: sharding for name, (_, sharding) in models.items()}

    def step(states: dict[str, TrainState], base: Any, feedback: RewardAndKLState, batch: OnePassBatch) -> Any:
        frozen, estimate_now = networks.frozen(base)._asdict(), functools.partial(estimate, feedback)

        def total(params: dict[str, Any], share: OnePassBatch, key: jax.Array) -> Any:
            joined = {name: lora.join(frozen[name], own) for name, own in params.items()}
            losses, aux, rest = _losses(networks, config, estimate_now, joined, share, key)
            return sum(loss_sum for loss_sum, _ in losses.values()), ({"losses": losses, "aux": aux}, rest)

        key = jax.random.fold_in(states["policy"].key, states["policy"].step)
        params = {name: state.params for name, state in states.items()}
        whole = _completed(config, estimate_now, batch)
        grads, sums, rest = accumulated(total, params, whole, key, num_microbatches)
        applied = {name: apply(states[name], grads[name], sums["losses"][name]) for name, apply in applies.items()}
        if whole.advantages is not None:  # estimated without log-probs, which the metrics want
            rest = estimate_now(batch.responses, rest, batch.rewards)[1:]
        feedback, metrics = rest
        by_model = {name: metrics for name, (_, metrics) in applied.items()}
        by_model["policy"] |= means(sums["aux"])
        return {name: state for name, (state, _) in applied.items()}, feedback, metrics, by_model

    return jax.jit(
        step,
        in_shardings=(state_shardings, base_sharding, feedback_sharding, batch_sharding),
        out_shardings=(state_shardings, feedback_sharding, None, None),
        donate_argnums=0,
    )


def _completed(config: PPOConfig, estimate: Callable[..., Any], batch: OnePassBatch) -> OnePassBatch:
    """With the advantages where they need no log-probs: a microbatch may then be any part of the batch."""
    if batch.ptx is not None:
        weight = ppo_loss.weigh_ptx(batch.responses, batch.ptx, config.loss_aggregation)
        batch = dataclasses.replace(batch, ptx_weight=weight)
    if config.reads_log_probs:
        return batch
    reference = batch.reference_log_probs  # in place of the policy's, which these advantages do not read
    blank = TokenLogProbs(reference, jnp.zeros_like(reference), reference, None)
    rollout, _, _ = estimate(batch.responses, blank, batch.rewards)
    return dataclasses.replace(batch, advantages=rollout.advantages)


def _losses(
    networks: Networks,
    config: PPOConfig,
    estimate: Callable[..., Any],
    params: dict[str, Any],
    batch: OnePassBatch,
    key: jax.Array,
) -> tuple[dict[str, Sum], dict[str, Sum], Any]:
    """Loss of each model; aux as in `ppo_loss.policy_loss` and `ppo_loss.critic_loss`; and what else was computed.

    The last is the next `RewardAndKLState` with the metrics of the rollout; or the `TokenLogProbs` where the advantages
    were there before.
    """
    token, shared_values = networks.read_policy(params["policy"], batch.responses)
    values = networks.values(params["critic"], batch.responses) if "critic" in params else shared_values
    every = TokenLogProbs(token.log_probs, token.entropy, batch.reference_log_probs, values, batch.sampler_log_probs)
    every = jax.tree.map(lambda x: jnp.where(batch.responses.response_mask, x, 0.0), jax.lax.stop_gradient(every))
    rest: Any = every
    if batch.advantages is None:
        rollout, *rest = estimate(batch.responses, every, batch.rewards)
    else:
        old = every.log_probs, every.reference_log_probs, every.values
        sampler_log_probs = None if config.importance_cap is None else every.sampler_log_probs
        rollout = Rollout(batch.responses, *old, batch.advantages, None, sampler_log_probs)
    update = PPOBatch(rollout, batch.ptx, batch.ptx_weight)
    policy_loss, aux = ppo_loss.policy_sum(networks, config, params["policy"], (token, shared_values), update, key)
    losses = {"policy": policy_loss}
    if "critic" in params:
        assert values is not None
        losses["critic"], critic_aux = ppo_loss.value_terms(values, rollout, config)
        aux |= critic_aux
    return losses, aux, rest
