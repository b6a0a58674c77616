"""Policy and critic of a PPO run over the devices: shapes and places of the state, first state, jitted programs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import ppo, ppo_loss
from jaxrm.algorithms.optimizer import build_optimizer
from jaxrm.algorithms.ppo_config import is_one_pass
from jaxrm.algorithms.ppo_one_pass import Estimate, build_one_pass_step
from jaxrm.algorithms.ppo_state import PPOState, RewardAndKLState
from jaxrm.algorithms.reward_config import weights_of
from jaxrm.algorithms.rollout import (
    BatchSampler,
    Networks,
    RewardSource,
    build_log_probs,
    build_reference_log_probs,
)
from jaxrm.algorithms.row_packing import build_pack_rows
from jaxrm.algorithms.state import TrainState, create
from jaxrm.algorithms.train_step import build_train_step
from jaxrm.inference import sharded_model
from jaxrm.inference.rollout_model import build_sampler, shard_rollout_model, with_storage
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import lora
from jaxrm.models.sampling import GenerateOptions, SamplingConfig
from jaxrm.models.transformer import DecodingStorage
from jaxrm.runtime.checkpoint import with_shardings
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards
from jaxrm.stage_config import PPO
from jaxrm.stages.rewards.calibration import build_next_calibration, uncalibrated_of
from jaxrm.stages.rewards.sources import are_terminal
from jaxrm.types import ResponseBatch


@dataclass(frozen=True)
class Learner:
    """What is trained, before any of it exists.

    Attributes:
      config: of the run.
      decoder: the policy's decoder, and so the reference.
      rollout_model: the same as it lies while it samples, from `jaxrm.inference.rollout_model.shard_rollout_model`.
      policy: what the policy's parameters belong to: ``decoder``, or both heads on one trunk.
      critic: None where it has no trunk of its own.
      num_steps: of the run.
      end_ids: tokens that end a response.
    """

    config: PPO
    decoder: ShardedModel
    rollout_model: ShardedModel
    policy: ShardedModel
    critic: ShardedModel | None
    num_steps: int
    end_ids: tuple[int, ...]

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.decoder.mesh

    @functools.cached_property
    def networks(self) -> Networks:
        """Graphs of policy and critic."""
        return Networks(
            decoder=self.decoder.graphdef,
            policy=self.policy.graphdef,
            critic=None if self.critic is None else self.critic.graphdef,
            is_shared=self.config.ppo.shared_trunk,
            temperature=self.config.rollout.sampling.temperature,
            pad_to_multiple_of=sharded_model.pad_to_multiple_of(self.mesh),
        )

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates on one rollout."""
        return self.config.ppo.num_epochs * self.config.ppo.num_minibatches

    @functools.cached_property
    def policy_optimizer(self) -> optax.GradientTransformation:
        """Optimizer of the policy."""
        return build_optimizer(self.config.optimizer, self.num_steps * self.updates_per_step)

    @functools.cached_property
    def critic_optimizer(self) -> optax.GradientTransformation:
        """Optimizer of the critic."""
        return build_optimizer(self.config.critic.optimizer, self.num_steps * self.updates_per_step)

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def shardings(self) -> PPOState:
        """Where each array of the state lies."""
        feedback = jax.tree.map(lambda _: self.replicated, _init_feedback(self.config, uncalibrated_of(self.config)))
        state_shardings = functools.partial(sharded_model.state_shardings, mesh=self.mesh)
        policy = state_shardings(self.policy, self.policy_optimizer, offload=self.config.optimizer.offload)
        critic = None
        if self.critic is not None:
            critic = state_shardings(self.critic, self.critic_optimizer, offload=self.config.critic.optimizer.offload)
        return PPOState(policy, critic, feedback, feedback.calibration)

    @property
    def abstract(self) -> PPOState:
        """Shapes and places of the state, to be restored into."""
        shapes = jax.eval_shape(
            lambda policy, critic, calibration, key: self._create(policy, critic, calibration, key),
            self.policy.trained_shapes,
            None if self.critic is None else self.critic.trained_shapes,
            uncalibrated_of(self.config),
            jax.random.key(0),
        )
        return with_shardings(shapes, self.shardings)

    def decoder_params(self, base: Any, policy_params: Any) -> Any:
        """The whole decoder of a policy, its base among it."""
        return lora.join(base, self.networks.decoder_params(policy_params))

    def init_state(self, policy: Any, critic: Any, key: jax.Array) -> PPOState:
        """The state before the first step, not calibrated yet; the parameters are donated."""
        shardings = self.shardings

        # Apart, since JAX pairs what is donated with what is returned by shape alone: the critic's parameters would
        # become moments of the policy, which may lie in another memory.
        def start(params: Any, optimizer: optax.GradientTransformation, sharding: TrainState) -> TrainState:
            made = jax.jit(lambda p, k: create(p, optimizer, k), out_shardings=sharding, donate_argnums=0)
            return made(params, key)

        init_feedback = jax.jit(functools.partial(_init_feedback, self.config), out_shardings=shardings.feedback)
        feedback = init_feedback(uncalibrated_of(self.config))
        return PPOState(
            start(policy, self.policy_optimizer, shardings.policy),
            None if shardings.critic is None else start(critic, self.critic_optimizer, shardings.critic),
            feedback,
            feedback.calibration,
        )

    def calibrated(self, state: PPOState, calibration: Any) -> PPOState:
        """The first state with its calibration."""
        feedback = _init_feedback(self.config, calibration)
        feedback, calibration = jax.device_put((feedback, calibration), self.replicated)
        return PPOState(state.policy, state.critic, feedback, calibration)

    def rollout_sampler(self) -> BatchSampler:
        """Samples the responses of a step: ``config.rollout.responses_per_prompt`` to each prompt."""
        rollout = self.config.rollout
        model = with_storage(self.rollout_model, DecodingStorage(rollout.weights, rollout.cache))
        options = GenerateOptions(rollout.sampling, self.end_ids, rollout.responses_per_prompt, rollout.slots)
        return self._sampler(model, options, rollout.num_microbatches)

    def sampler(self, sampling: SamplingConfig) -> BatchSampler:
        """Samples one response to each prompt, in so many parts that they take no larger cache than a step's.

        A batch has as many prompts as a step has responses, and no responses share a prompt's part of the cache.
        """
        config, rollout = self.config, self.config.rollout
        options = GenerateOptions(sampling, self.end_ids)
        if rollout.responses_per_prompt == 1:
            options = replace(options, slots=rollout.slots)
            return self._sampler(self.rollout_model, options, rollout.num_microbatches)
        batch_size, width = config.data.batch_size, config.data.max_length
        length = rollout.sampling.max_new_tokens
        tokens = length + (width - length) / rollout.responses_per_prompt  # in the cache, of a response of a step
        rows = batch_size // batch_shards(self.rollout_model.mesh)
        at_once = rollout.slots or batch_size // rollout.num_microbatches
        parts = next(n for n in range(1, rows + 1) if rows % n == 0 and width * batch_size / n <= tokens * at_once)
        return self._sampler(self.rollout_model, options, parts)

    def _sampler(self, model: ShardedModel, options: GenerateOptions, num_microbatches: int) -> BatchSampler:
        dtype = self.config.model.dtype
        return build_sampler(self.decoder, model, dtype=dtype, options=options, num_microbatches=num_microbatches)

    def programs(self, source: RewardSource) -> ppo.Programs:
        """The jitted programs of a step, with rewards from ``source``."""
        config, rows, shardings = self.config, partition.batch_sharding(self.mesh), self.shardings
        estimate = functools.partial(
            ppo.estimate,
            config=config.ppo,
            next_calibration=build_next_calibration(config),
            groups=ppo.Groups(config.rollout.responses_per_prompt, are_terminal(config)),
        )
        reward_metrics = functools.partial(ppo.reward_metrics, weights=weights_of(config))
        minibatch = functools.partial(ppo.minibatch, num_minibatches=config.ppo.num_minibatches)
        update_policy, update_critic = self._updates()
        one_pass = None
        if is_one_pass(config.ppo, config.num_microbatches):
            one_pass = self._one_pass(estimate)
        readings = {
            "reference_sharding": self.decoder.trained_shardings,
            "batch_sharding": rows,
            "base_sharding": self.decoder.frozen_shardings,
            "num_microbatches": config.num_microbatches,
        }
        return ppo.Programs(
            rollout=self.rollout_sampler(),
            log_probs=build_log_probs(
                self.networks,
                policy_sharding=self.policy.trained_shardings,
                critic_sharding=None if self.critic is None else self.critic.trained_shardings,
                **readings,
            ),
            scoring=source,
            estimate=jax.jit(
                estimate,
                in_shardings=(shardings.feedback, rows, rows, rows),
                out_shardings=(rows, shardings.feedback, self.replicated),
            ),
            minibatch=jax.jit(minibatch, in_shardings=(rows, None, None), out_shardings=rows),
            weigh=jax.jit(
                functools.partial(ppo.weigh, aggregation=config.ppo.loss_aggregation),
                in_shardings=(rows, rows),
                out_shardings=rows,
            ),
            update_policy=update_policy,
            update_critic=update_critic,
            reference_log_probs=build_reference_log_probs(self.networks, **readings),
            pack_rows=self._pack_rows(),
            reward_metrics=jax.jit(reward_metrics, in_shardings=(rows,), out_shardings=self.replicated),
            one_pass=one_pass,
        )

    def _pack_rows(self) -> Callable[[ResponseBatch], ResponseBatch]:
        """Lets prompts with their responses share rows, where the config says so."""
        if not self.config.ppo.packing:
            return lambda batch: batch
        return build_pack_rows(
            partition.batch_sharding(self.mesh),
            num_shards=batch_shards(self.mesh),
            num_microbatches=self.config.num_microbatches,
            pad_to_multiple_of=self.networks.pad_to_multiple_of,
        )

    def _updates(self) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        """The jitted updates of policy and critic, one after another; of the latter where it has a trunk of its own."""
        shardings, loss = self.shardings, self.config.ppo
        build_step = functools.partial(
            build_train_step,
            batch_sharding=partition.batch_sharding(self.mesh),
            num_microbatches=self.config.num_microbatches,
        )
        update_policy = build_step(
            ppo_loss.policy_loss(self.networks, loss),
            self.policy_optimizer,
            state_sharding=shardings.policy,
            frozen_sharding=self.policy.frozen_shardings,
        )
        if self.critic is None:
            return update_policy, None
        update_critic = build_step(
            ppo_loss.critic_loss(self.networks, loss),
            self.critic_optimizer,
            state_sharding=shardings.critic,
            frozen_sharding=self.critic.frozen_shardings,
        )
        return update_policy, update_critic

    def _one_pass(self, estimate: Estimate) -> Callable[..., Any]:
        """The jitted update of policy and critic in one pass."""
        shardings = self.shardings
        models = {"policy": (self.policy_optimizer, shardings.policy)}
        if shardings.critic is not None:
            models["critic"] = (self.critic_optimizer, shardings.critic)
        return build_one_pass_step(
            self.networks,
            self.config.ppo,
            estimate,
            models,
            base_sharding=dict(self.decoder.frozen_shardings),
            feedback_sharding=shardings.feedback,
            batch_sharding=partition.batch_sharding(self.mesh),
            num_microbatches=self.config.num_microbatches,
        )

    def _create(self, policy: Any, critic: Any, calibration: Any, key: jax.Array) -> PPOState:
        made = None if self.critic is None else create(critic, self.critic_optimizer, key)
        feedback = _init_feedback(self.config, calibration)
        return PPOState(create(policy, self.policy_optimizer, key), made, feedback, calibration)


def open_learner(
    config: PPO,
    mesh: Mesh,
    decoder: ShardedModel,
    critic: ShardedModel | None,
    *,
    num_steps: int,
    end_ids: tuple[int, ...],
) -> Learner:
    """Lay policy and critic over the devices; nothing is allocated.

    Args:
      config: the whole config.
      mesh: the devices.
      decoder: the policy's.
      critic: from `jaxrm.stages.ppo.critic.open_critic`; None where it has no trunk of its own.
      num_steps: rollouts in all.
      end_ids: tokens that end a response.

    Raises:
      UserError: where policy or batch do not fit ``config.rollout.mesh``.
    """
    policy = decoder
    if config.ppo.shared_trunk:
        policy = sharded_model.shard_actor_critic(config.model, mesh, decoder.config, lora=decoder.lora)
    rollout_model = shard_rollout_model(config, mesh, decoder)
    return Learner(config, decoder, rollout_model, policy, critic, num_steps, end_ids)


def _init_feedback(config: PPO, calibration: Any) -> RewardAndKLState:
    return RewardAndKLState(calibration, jnp.asarray(np.float32(config.ppo.kl_coef)))
