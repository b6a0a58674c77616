"""PPO's update where it is the only one of its rollout: policy and critic are read once.

The log-probs of the update are then those that the responses were drawn with, and its values those before it. So
rewards, advantages and losses follow from one forward, and only the first two have no gradient. The ratio of new to old
probabilities is 1 by construction. `jaxrm.algorithms.ppo_config.is_one_pass` says where this holds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrm.algorithms import ppo_loss
from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.ppo_state import RewardAndKLState
from jaxrm.algorithms.rollout import Networks, TokenLogProbs
from jaxrm.algorithms.train_step import Metrics, Sum
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
      ptx: rows of SFT data, or None.
      ptx_weight: as in `jaxrm.algorithms.ppo_state.PPOBatch`; `OnePassLoss.prepare` fills it in.
      advantages: ``[B, T]`` float32, where they need no log-probs; `OnePassLoss.prepare` fills them in.
    """

    responses: ResponseBatch
    reference_log_probs: jax.Array
    rewards: TokenRewards
    ptx: TokenBatch | None = None
    ptx_weight: jax.Array | None = None
    advantages: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class OnePassLoss:
    """Losses of policy and critic, as `jaxrm.algorithms.train_step.build_joint_step` takes them.

    The context of a step is its `RewardAndKLState`.

    Attributes:
      networks: graphs of the models.
      config: options of PPO.
      estimate: from token rewards to advantages.
    """

    networks: Networks
    config: PPOConfig
    estimate: Estimate

    def frozen(self, base: Any) -> dict[str, Any]:
        """The frozen parameters of policy and critic."""
        return self.networks.frozen(base)._asdict()

    def prepare(self, context: RewardAndKLState, batch: OnePassBatch) -> OnePassBatch:
        """With the advantages where they need no log-probs: a microbatch may then be any part of the batch."""
        if batch.ptx is not None:
            weight = ppo_loss.weigh_ptx(batch.responses, batch.ptx, self.config.loss_aggregation)
            batch = dataclasses.replace(batch, ptx_weight=weight)
        if self.config.reads_log_probs:
            return batch
        reference = batch.reference_log_probs  # in place of the policy's, which these advantages do not read
        blank = TokenLogProbs(reference, jnp.zeros_like(reference), reference, None)
        rollout, _, _ = self.estimate(context, batch.responses, blank, batch.rewards)
        return dataclasses.replace(batch, advantages=rollout.advantages)

    def __call__(
        self, params: dict[str, Any], context: RewardAndKLState, batch: OnePassBatch, key: jax.Array
    ) -> tuple[dict[str, Sum], dict[str, Sum], TokenLogProbs]:
        """Losses and metrics as in `ppo_loss.policy_loss` and `ppo_loss.critic_loss`; log-probs and values."""
        token, values = self.networks.read_policy(params["policy"], batch.responses)
        if "critic" in params:
            values = self.networks.values(params["critic"], batch.responses)
        every = TokenLogProbs(token.log_probs, token.entropy, batch.reference_log_probs, values)
        every = jax.tree.map(lambda x: jnp.where(batch.responses.response_mask, x, 0.0), jax.lax.stop_gradient(every))
        if batch.advantages is None:
            rollout, _, _ = self.estimate(context, batch.responses, every, batch.rewards)
        else:
            old = every.log_probs, every.reference_log_probs, every.values
            rollout = Rollout(batch.responses, *old, batch.advantages, None)

        (total, weight), aux = ppo_loss.policy_terms(token, rollout, self.config)
        critic = {}
        if values is not None:
            value_loss, critic_aux = ppo_loss.value_terms(values, rollout, self.config)
            aux |= critic_aux
            if "critic" in params:
                critic["critic"] = value_loss
            else:
                total += self.config.value_coef * value_loss[0]
        if batch.ptx is not None and batch.ptx_weight is not None:
            ptx_sum, aux["ptx_loss"] = ppo_loss.ptx_terms(
                self.networks, params["policy"], batch.ptx, batch.ptx_weight, key
            )
            total += self.config.ptx_coef * ptx_sum
        return {"policy": (total, weight), **critic}, aux, every

    def finish(
        self, context: RewardAndKLState, batch: OnePassBatch, rows: TokenLogProbs
    ) -> tuple[RewardAndKLState, Metrics]:
        """Calibration and KL coefficient of the next step, and the metrics of the rollout."""
        _, context, metrics = self.estimate(context, batch.responses, rows, batch.rewards)
        return context, metrics
