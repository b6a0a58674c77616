"""Policy and critic of a PPO run over the devices: shapes and places of the state, first state, jitted programs."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import ppo, ppo_loss, rollout, train_step
from jaxrm.algorithms.optimizer import build_optimizer
from jaxrm.algorithms.ppo_state import PPOBatch, PPOState, RewardAndKLState
from jaxrm.algorithms.rollout import Networks, Respond, RewardSource
from jaxrm.algorithms.state import TrainState, create
from jaxrm.experiment import Experiment
from jaxrm.inference import rollout_model as rollouts
from jaxrm.inference import sharded_model
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models.generate import SamplingConfig
from jaxrm.ops import reward_scaling
from jaxrm.ops.token_rewards import find_kind
from jaxrm.runtime.checkpoint import with_shardings
from jaxrm.sharding import partition


@dataclass(frozen=True)
class Learner:
    """What is trained, before any of it exists.

    Attributes:
      config: the whole config.
      mesh: the devices.
      networks: graphs of policy and critic.
      decoder: the policy's decoder, and so the reference.
      rollout_model: the same while it answers, from `jaxrm.inference.rollout_model.shard_rollout_model`.
      policy: what the policy's parameters belong to: ``decoder``, or both heads on one trunk.
      critic: None where the trunk is shared.
      policy_optimizer: of the policy.
      critic_optimizer: of the critic.
      end_ids: tokens that end a response.
    """

    config: Experiment
    mesh: Mesh
    networks: Networks
    decoder: ShardedModel
    rollout_model: ShardedModel
    policy: ShardedModel
    critic: ShardedModel | None
    policy_optimizer: optax.GradientTransformation
    critic_optimizer: optax.GradientTransformation
    end_ids: tuple[int, ...]

    @property
    def copied(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def shardings(self) -> PPOState:
        """Where each array of the state lies."""
        feedback = jax.tree.map(lambda _: self.copied, _first_feedback(self.config, reward_scaling.uncalibrated()))
        place = functools.partial(sharded_model.state_shardings, mesh=self.mesh)
        policy = place(self.policy, self.policy_optimizer, offload=self.config.optimizer.offload)
        critic = None
        if self.critic is not None:
            critic = place(self.critic, self.critic_optimizer, offload=self.config.critic.optimizer.offload)
        return PPOState(policy, critic, feedback, feedback.calibration)

    @property
    def abstract(self) -> PPOState:
        """Shapes and places of the state, to be restored into."""
        shapes = jax.eval_shape(
            lambda policy, critic, calibration, key: self._create(policy, critic, calibration, key),
            self.policy.shapes,
            None if self.critic is None else self.critic.shapes,
            reward_scaling.uncalibrated(),
            jax.random.key(0),
        )
        return with_shardings(shapes, self.shardings)

    def init_state(self, policy: Any, critic: Any, key: jax.Array) -> PPOState:
        """The state before the first step, not calibrated yet; the parameters are donated."""
        shardings = self.shardings

        # Apart, since JAX pairs what is donated with what is returned by shape alone: the critic's parameters would
        # become moments of the policy, which may lie in another memory.
        def start(params: Any, optimizer: optax.GradientTransformation, sharding: TrainState) -> TrainState:
            made = jax.jit(lambda p, k: create(p, optimizer, k), out_shardings=sharding, donate_argnums=0)
            return made(params, key)

        first_feedback = jax.jit(functools.partial(_first_feedback, self.config), out_shardings=shardings.feedback)
        feedback = first_feedback(reward_scaling.uncalibrated())
        return PPOState(
            start(policy, self.policy_optimizer, shardings.policy),
            None if shardings.critic is None else start(critic, self.critic_optimizer, shardings.critic),
            feedback,
            feedback.calibration,
        )

    def calibrated(self, state: PPOState, calibration: reward_scaling.Calibration) -> PPOState:
        """The first state with its calibration."""
        feedback = _first_feedback(self.config, calibration)
        feedback, first = jax.device_put((feedback, calibration), self.copied)
        return PPOState(state.policy, state.critic, feedback, first)

    def respond(self, sampling: SamplingConfig) -> Respond:
        """How the policy answers."""
        return rollouts.build_sampler(
            self.decoder, self.rollout_model, dtype=self.config.model.dtype, sampling=sampling, end_ids=self.end_ids
        )

    def programs(self, reward: RewardSource) -> ppo.Programs:
        """The jitted parts of a step."""
        config, rows, parts = self.config, partition.batch_sharding(self.mesh), self.config.num_microbatches
        shardings = self.shardings
        running = config.reward.center == "running"
        estimate = functools.partial(
            ppo.estimate,
            config=config.ppo,
            kind=find_kind(config.reward.kind),
            center_momentum=config.reward.center_momentum if running else None,
        )
        build = functools.partial(train_step.build_train_step, batch_sharding=rows, num_microbatches=parts)
        share = functools.partial(ppo.minibatch, parts=config.ppo.num_minibatches)

        def no_critic(state: TrainState, batch: PPOBatch) -> Any:
            raise AssertionError("a shared trunk has no critic of its own")

        return ppo.Programs(
            respond=self.respond(config.rollout.sampling),
            read=rollout.build_log_probs(
                self.networks,
                policy_sharding=self.policy.shardings,
                critic_sharding=None if self.critic is None else self.critic.shardings,
                reference_sharding=self.decoder.shardings,
                batch_sharding=rows,
                num_microbatches=parts,
            ),
            reward=reward,
            estimate=jax.jit(
                estimate,
                in_shardings=(shardings.feedback, rows, rows, rows),
                out_shardings=(rows, shardings.feedback, self.copied),
            ),
            minibatch=jax.jit(share, in_shardings=(rows, None, None), out_shardings=rows),
            weigh=jax.jit(ppo.weigh, in_shardings=(rows, rows), out_shardings=rows),
            update_policy=build(
                ppo_loss.policy_loss(self.networks, config.ppo),
                self.policy_optimizer,
                state_sharding=shardings.policy,
            ),
            update_critic=no_critic
            if self.critic is None
            else build(
                ppo_loss.critic_loss(self.networks, config.ppo),
                self.critic_optimizer,
                state_sharding=shardings.critic,
            ),
        )

    def _create(self, policy: Any, critic: Any, calibration: reward_scaling.Calibration, key: jax.Array) -> PPOState:
        made = None if self.critic is None else create(critic, self.critic_optimizer, key)
        feedback = _first_feedback(self.config, calibration)
        return PPOState(create(policy, self.policy_optimizer, key), made, feedback, calibration)


def open_learner(
    config: Experiment,
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
      critic: from `jaxrm.stages.ppo.critic.open_critic`; None where the trunk is shared.
      num_steps: rollouts in all.
      end_ids: tokens that end a response.

    Raises:
      UserError: where policy or batch do not fit ``config.rollout.mesh``.
    """
    policy = decoder if critic is not None else sharded_model.shard_actor_critic(config.model, mesh, decoder.config)
    updates = num_steps * config.ppo.num_epochs * config.ppo.num_minibatches
    networks = Networks(
        decoder=decoder.graphdef,
        policy=policy.graphdef,
        critic=None if critic is None else critic.graphdef,
        temperature=config.rollout.sampling.temperature,
        pad_to_multiple_of=sharded_model.pad_to_multiple_of(mesh),
    )
    return Learner(
        config,
        mesh,
        networks,
        decoder,
        rollouts.shard_rollout_model(config, mesh, decoder),
        policy,
        critic,
        build_optimizer(config.optimizer, updates),
        build_optimizer(config.critic.optimizer, updates),
        end_ids,
    )


def _first_feedback(config: Experiment, calibration: reward_scaling.Calibration) -> RewardAndKLState:
    return RewardAndKLState(calibration, jnp.asarray(np.float32(config.ppo.kl_coef)))
