"""The arithmetic of PPO with a reward at every token.

A step (`jaxrm.stages.ppo.loop`) has four phases: rollout, log_probs, scoring, update. The policy samples a response to
each prompt; policy, reference and critic give log-probs and values; the reward source gives token rewards ``r_t``. Here
they become advantages (`estimate`), and policy and critic are updated on them (`update`).

    R_t = clamp(r_t - beta (log pi_old(y_t) - log pi_ref(y_t)), -c, c)
    A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = R_t + gamma V_{t+1} - V_t,   G_t = A_t + V_t
    L_pi = - mean min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)
    L_V = 1/2 mean max((V_t - G_t)^2, (clip(V_t, V_old,t - eps_v, V_old,t + eps_v) - G_t)^2)

Without a critic the advantage of a token compares the n responses to a prompt, with ``G_i,t = sum_{l >= t} R_i,l``
(`jaxrm.ops.advantages`):

    rloo         A_i,t = G_i,t - mean_{j != i} G_j,t
    grpo         A_i,t = sum_{l >= t} (r_i,l - mean) / (std + 1e-4) over the group's tokens; its KL is in the loss
    reinforce++  A_i,t = G_i,t - mean_j G_j,t, whitened over the batch

Where a rollout has one update alone, all of this follows from that update's own forward
(`jaxrm.algorithms.ppo_one_pass`). Every reward source is treated alike: a scalar reward model differs in ``r_t`` alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.ppo_loss import weigh_ptx
from jaxrm.algorithms.ppo_one_pass import OnePassBatch
from jaxrm.algorithms.ppo_state import PPOBatch, PPOState, RewardAndKLState
from jaxrm.algorithms.rollout import BatchSampler, FrozenParams, RewardSource, TokenLogProbs
from jaxrm.algorithms.state import TrainState
from jaxrm.algorithms.summed_rewards import source_metrics
from jaxrm.algorithms.train_step import Metrics
from jaxrm.ops import advantages, kl, masking
from jaxrm.types import ResponseBatch, Rollout, TokenBatch, TokenRewards

NextCalibration = Callable[[Any, TokenRewards], Any]
"""``(calibration, rewards) -> calibration`` of the next step; see `jaxrm.algorithms.rollout.RewardSource`."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """How responses are compared where there is no critic.

    Attributes:
      size: n, responses to a prompt; they lie next to each other.
      is_terminal: whether every source of rewards rewards a response as a whole, on its last token.
    """

    size: int = 1
    is_terminal: bool = False


def estimate(
    feedback: RewardAndKLState,
    batch: ResponseBatch,
    token_log_probs: TokenLogProbs,
    rewards: TokenRewards,
    *,
    config: PPOConfig,
    next_calibration: NextCalibration,
    groups: Groups = Groups(),
) -> tuple[Rollout, RewardAndKLState, Metrics]:
    """From token rewards to advantages, and to the calibration and KL coefficient of the next step.

    Args:
      feedback: calibration and KL coefficient of this step.
      batch: the responses.
      token_log_probs: of policy and reference, with the critic's values.
      rewards: of the reward source.
      config: options of PPO.
      next_calibration: moves running centers on.
      groups: how responses are compared.

    Returns:
      The rollout ``[B, T]`` to update on; the next ``feedback``; metrics, float32 scalars.
    """
    mask, shaped = batch.response_mask, _shaped_rewards(rewards, batch.response_mask, config)
    penalized = kl.penalized_rewards(
        shaped,
        token_log_probs.log_probs,
        token_log_probs.reference_log_probs,
        mask,
        coefficient=0.0 if config.advantage == "grpo" else feedback.kl_coef,
        limit=config.reward_clip,
        estimator=config.kl_estimator,
    )
    values = token_log_probs.values
    advantage, returns = _advantages(penalized, values, mask, config, groups)
    deviation = jnp.sqrt(masking.masked_mean(jnp.square(advantage - masking.masked_mean(advantage, mask)), mask))
    metrics = _rollout_metrics(batch, token_log_probs, rewards, penalized)
    if values is not None and returns is not None:
        metrics["explained_variance"] = advantages.explained_variance(values, returns, mask)
    elif groups.size > 1:
        unpenalized, _ = _advantages(shaped, None, mask, config, groups)  # a KL differs where rewards do not
        metrics["equal_groups"] = advantages.equal_groups(unpenalized, mask, group_size=groups.size)
    if config.is_whitened:
        advantage = masking.masked_whiten(advantage, mask)

    metrics |= {
        "kl_coef": feedback.kl_coef,
        "advantage_std": deviation,
    }
    if rewards.parts:
        metrics |= {f"center/{name}": calibration.center for name, calibration in feedback.calibration.items()}
    else:
        metrics["center"] = feedback.calibration.center
    calibration, kl_coef = next_calibration(feedback.calibration, rewards), feedback.kl_coef
    if config.kl_target is not None:
        kl_coef = kl.next_coefficient(
            kl_coef,
            metrics["kl"],
            target=config.kl_target,
            horizon=config.kl_horizon,
            count=jnp.sum(jnp.any(mask, axis=1)),
        )
    log_probs, reference_log_probs = token_log_probs.log_probs, token_log_probs.reference_log_probs
    sampler_log_probs = None if config.importance_cap is None else token_log_probs.sampler_log_probs
    rollout = Rollout(batch, log_probs, reference_log_probs, values, advantage, returns, sampler_log_probs)
    return rollout, RewardAndKLState(calibration, kl_coef), metrics


def _advantages(
    rewards: jax.Array, values: jax.Array | None, mask: jax.Array, config: PPOConfig, groups: Groups
) -> tuple[jax.Array, jax.Array | None]:
    """Advantages ``[B, T]``, not whitened; and the critic's targets where there are values."""
    if values is not None:
        return advantages.gae(rewards, values, mask, discount=config.discount, gae_lambda=config.gae_lambda)
    function = {
        "rloo": advantages.rloo,
        "grpo": advantages.grpo,
        "reinforce++": advantages.reinforce_plus_plus,
    }[config.advantage]
    return function(rewards, mask, group_size=groups.size, is_terminal=groups.is_terminal), None


def _shaped_rewards(rewards: TokenRewards, mask: jax.Array, config: PPOConfig) -> jax.Array:
    """Token rewards ``[B, T]``, normalized where the config says so, less penalties for a missing or early end."""
    shaped = rewards.rewards
    if config.normalize_rewards:
        mean = masking.masked_mean(shaped, mask)
        variance = masking.masked_mean(jnp.square(shaped - mean), mask)
        shaped = shaped * jax.lax.rsqrt(variance + 1e-8)
    ended, end_tag = rewards.diagnostics["ended"], rewards.diagnostics["end_tag"]
    is_early = (ended == 1) & (end_tag == 0)
    penalty = jnp.where(is_early, config.early_end_penalty, jnp.where(ended == 0, config.missing_end_penalty, 0.0))
    return shaped - jnp.where(masking.last_token(mask), penalty[:, None], 0.0)


def _rollout_metrics(
    batch: ResponseBatch, token_log_probs: TokenLogProbs, rewards: TokenRewards, penalized: jax.Array
) -> Metrics:
    """Means over responses, or over their tokens; float32 scalars."""
    mask = batch.response_mask
    log_ratio = kl.kl_estimate("k1", token_log_probs.log_probs, token_log_probs.reference_log_probs)
    responses = jnp.any(mask, axis=1)  # a response without a token has no KL and no reward to average
    response_kl = masking.masked_sum(log_ratio, mask, axis=1)
    mean_kl = masking.masked_mean(response_kl, responses)
    variance = masking.masked_mean(jnp.square(response_kl - mean_kl), responses)
    metrics = {
        "reward_uncalibrated": masking.masked_mean(masking.masked_sum(rewards.values, mask, axis=1), responses),
        "return": masking.masked_mean(masking.masked_sum(penalized, mask, axis=1), responses),
        "kl": mean_kl,
        "kl_error": jnp.sqrt(variance / jnp.maximum(jnp.sum(responses), 1)),
        "kl_per_token": masking.masked_mean(log_ratio, mask),
        "response_length": masking.masked_mean(rewards.diagnostics["length"], responses),
        "tokens": jnp.sum(mask, dtype=jnp.float32),
        "prompt_tokens": jnp.sum(batch.prompt_mask, dtype=jnp.float32),
    }
    if token_log_probs.sampler_log_probs is not None:
        difference = jnp.abs(token_log_probs.log_probs - token_log_probs.sampler_log_probs)
        metrics["sampler_mismatch"] = masking.masked_mean(difference, mask)
    if token_log_probs.values is not None:
        metrics["value"] = masking.masked_mean(token_log_probs.values, mask)
    for name in ("ended", "tag_rate", "divergence", "end_tag"):
        metrics[name] = masking.masked_mean(rewards.diagnostics[name], responses)
    return metrics


def minibatch(rollout: Rollout, key: jax.Array, index: jax.Array, *, num_minibatches: int) -> Rollout:
    """Minibatch ``index`` of the responses, which ``key`` shuffles.

    Args:
      rollout: ``[B, T]``.
      key: typed PRNG key of the epoch; the same for all of its minibatches.
      index: ``[]`` int32, below ``num_minibatches``.
      num_minibatches: divides B.
    """
    rows = rollout.log_probs.shape[0]
    chosen = jax.random.permutation(key, rows).reshape(num_minibatches, rows // num_minibatches)[index]
    return jax.tree.map(lambda x: x[chosen], rollout)


def weigh(rollout: Rollout, ptx: TokenBatch, *, aggregation: str = "token") -> PPOBatch:
    """A rollout and rows of SFT data as one batch (see `PPOBatch`)."""
    return PPOBatch(rollout, ptx, weigh_ptx(rollout.responses, ptx, aggregation))


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of a step, by phase.

    Attributes:
      rollout: samples a response to each prompt.
      log_probs: from `jaxrm.algorithms.rollout.build_log_probs`.
      scoring: source of token rewards.
      estimate: `estimate`, the end of the scoring.
      minibatch: `minibatch`, the first of the update's programs.
      weigh: `weigh`.
      update_policy: on frozen parameters and a `PPOBatch`; the state is donated.
      update_critic: the same for the critic; None where it has no trunk of its own.
      reference_log_probs: the part of ``log_probs`` that an update in one pass needs before it.
      reward_metrics: `reward_metrics`, by which a reward that is not finite is seen before the update.
      pack_rows: lets prompts with their responses share rows (`jaxrm.algorithms.row_packing`); else the batch as it is.
      one_pass: from `jaxrm.algorithms.ppo_one_pass.build_one_pass_step`, in place of ``estimate``, ``minibatch``,
        ``weigh``, ``update_policy`` and ``update_critic``; None where the config is not one of
        `ppo_config.is_one_pass`.
    """

    rollout: BatchSampler
    log_probs: Callable[..., TokenLogProbs]
    scoring: RewardSource
    estimate: Callable[..., tuple[Rollout, RewardAndKLState, Metrics]]
    minibatch: Callable[..., Rollout]
    weigh: Callable[..., PPOBatch]
    update_policy: Callable[[TrainState, Any, PPOBatch], tuple[TrainState, Metrics]]
    update_critic: Callable[[TrainState, Any, PPOBatch], tuple[TrainState, Metrics]] | None
    reference_log_probs: Callable[[Any, Any, ResponseBatch], jax.Array]
    reward_metrics: Callable[[TokenRewards], Metrics]
    pack_rows: Callable[[ResponseBatch], ResponseBatch]
    one_pass: Callable[..., Any] | None = None


def update(
    programs: Programs,
    config: PPOConfig,
    state: PPOState,
    frozen: FrozenParams,
    rollout: Rollout,
    key: jax.Array,
    next_ptx: Callable[[], TokenBatch | None],
) -> tuple[PPOState, list[Metrics]]:
    """Every epoch and minibatch of a rollout.

    Args:
      programs: jitted.
      config: options of PPO.
      state: before; donated.
      frozen: what is not trained of policy and critic.
      rollout: from `estimate`.
      key: typed PRNG key; epoch ``i`` is shuffled with ``fold_in(key, i)``.
      next_ptx: gives the SFT rows of each update, or None.

    Returns:
      The state after, and the metrics of each update.
    """
    policy, critic, rows = state.policy, state.critic, []
    for epoch in range(config.num_epochs):
        for index in range(config.num_minibatches):
            share = rollout
            if config.num_minibatches > 1:
                share = programs.minibatch(rollout, jax.random.fold_in(key, epoch), np.int32(index))
            share = dataclasses.replace(share, responses=programs.pack_rows(share.responses))
            ptx = next_ptx()
            batch = PPOBatch(share) if ptx is None else programs.weigh(share, ptx)
            policy, metrics = programs.update_policy(policy, frozen.policy, batch)
            if critic is not None:
                assert programs.update_critic is not None
                critic, critic_metrics = programs.update_critic(critic, frozen.critic, PPOBatch(share))
                metrics |= {name: critic_metrics[name] for name in ("value_loss", "value_clip_fraction")}
                metrics["critic_grad_norm"] = critic_metrics["grad_norm"]
            rows.append(metrics)
    return dataclasses.replace(state, policy=policy, critic=critic), rows


def update_in_one_pass(
    programs: Programs, state: PPOState, base: Any, batch: OnePassBatch
) -> tuple[PPOState, Metrics, list[Metrics]]:
    """The only update of a rollout; see `jaxrm.algorithms.ppo_one_pass`.

    Args:
      programs: jitted.
      state: before; donated.
      base: frozen parameters under the adapters of policy and critic; ``{}`` where they have none.
      batch: responses, rewards and the reference's log-probs.

    Returns:
      The state after, the metrics of the rollout as those of `estimate`, and those of the update as those of `update`.
    """
    assert programs.one_pass is not None
    batch = dataclasses.replace(batch, responses=programs.pack_rows(batch.responses))
    states = {"policy": state.policy}
    if state.critic is not None:
        states["critic"] = state.critic
    states, feedback, metrics, by_model = programs.one_pass(states, base, state.feedback, batch)
    policy_metrics = by_model["policy"]
    if state.critic is not None:
        policy_metrics["critic_grad_norm"] = by_model["critic"]["grad_norm"]
    after = dataclasses.replace(state, policy=states["policy"], critic=states.get("critic"), feedback=feedback)
    return after, metrics, [policy_metrics]


def reward_metrics(rewards: TokenRewards, *, weights: Mapping[str, float]) -> Metrics:
    """The mean over responses of their sum of rewards, and what each source of a sum gives.

    It is a program of its own, since what is logged of several sources must not change the update of one by a bit.

    Args:
      rewards: ``[B, T]``.
      weights: of the sources of a sum, by name; empty for one source.

    Returns:
      ``reward``, and of several sources what `jaxrm.algorithms.summed_rewards.source_metrics` says; float32 scalars.
    """
    counted = jnp.any(rewards.mask, axis=1)
    metrics = {"reward": masking.masked_mean(rewards.diagnostics["sum"], counted)}
    return metrics | (source_metrics(rewards.parts, rewards.mask, weights) if rewards.parts else {})
