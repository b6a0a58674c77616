"""What a PPO config alone shows to be wrong, before anything is opened."""

from typing import Any

from jax.sharding import Mesh

from jaxrm.algorithms.ppo_config import CriticConfig
from jaxrm.config import dicts, field_types
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.rollout_model import check_groups
from jaxrm.models.sampling import check_on_policy
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards, check_batch, check_row_length
from jaxrm.stages.judge import check_judge
from jaxrm.stages.rewards.sources import check_has_rewards, check_origins
from jaxrm.stages.stage import check_is_policy


def check(config: Any, mesh: Mesh) -> None:
    """Refuse what the config alone shows to be wrong.

    Raises:
      UserError: a batch that does not fit the devices; a response longer than its rows; no rewards, or no policy.
    """
    check_on_policy(config.rollout.sampling, "rollout.sampling")
    _check_batches(config, mesh)
    check_judge(config.evaluation.judge)
    _check_advantage(config)
    _check_models(config)


def _check_batches(config: Any, mesh: Mesh) -> None:
    field, num_microbatches = "data.batch_size", config.num_microbatches
    check_batch(mesh, field, config.data.batch_size, num_microbatches)
    check_groups(config, mesh)
    num_minibatches = config.ppo.num_minibatches
    unit = batch_shards(mesh) * num_microbatches * num_minibatches
    if config.data.batch_size % unit:
        raise UserError(
            f"{option(field)} is {config.data.batch_size}, which does not divide into {num_minibatches} minibatches of "
            f"{num_microbatches} "
            f"microbatches on {batch_shards(mesh)} devices; use a multiple of {unit}, e.g. {flag(field)}={unit}"
        )
    if config.ppo.kl_target is not None and config.ppo.kl_horizon < config.data.batch_size:
        raise UserError(
            f"{option('ppo.kl_horizon')} is {config.ppo.kl_horizon}, less than the {config.data.batch_size} "
            f"responses of a "
            f"step, for which the controller would leap; e.g. {flag('ppo.kl_horizon')}=10000"
        )
    for field, optimizer in (
        ("optimizer", config.optimizer),
        ("critic.optimizer", config.critic.optimizer),
    ):
        if optimizer.offload:
            partition.check_host_memory(mesh, f"{option(f'{field}.offload')}")
    if config.ptx is not None:
        check_batch(mesh, "ptx.batch_size", config.ptx.batch_size, num_microbatches)
        check_row_length(mesh, "ptx.max_length", config.ptx.max_length)
    evaluated, longest = config.evaluation.sampling.max_new_tokens, config.rollout.sampling.max_new_tokens
    if evaluated > longest:
        raise UserError(
            f"{option('evaluation.sampling.max_new_tokens')} is {evaluated}, but rows have room for responses of "
            f"{option('rollout.sampling.max_new_tokens')} {longest}; e.g. "
            f"{flag('evaluation.sampling.max_new_tokens')}={longest}"
        )


def _check_advantage(config: Any) -> None:
    """Refuse a group of one where responses are compared, and options of a critic where there is none."""
    advantage, n = config.ppo.advantage, config.rollout.responses_per_prompt
    if advantage in ("rloo", "grpo") and n == 1:
        raise UserError(
            f"{option('rollout.responses_per_prompt')} is 1, but {option('ppo.advantage')}={advantage} compares the "
            f"responses to a prompt with each other; give at least 2, e.g. {flag('rollout.responses_per_prompt')}=4"
        )
    if config.ppo.has_values:
        return
    different = dicts.differences(config.critic, CriticConfig())
    if different:
        given = ", ".join(f"{option(f'critic.{name}')} is {value!r}" for name, value, _ in different)
        defaults = " ".join(
            f"{flag(f'critic.{name}')}={field_types.as_text(default)}" for name, _, default in different
        )
        raise UserError(f"{given}, but {option('ppo.advantage')}={advantage} has no critic; use {defaults}")


def _check_models(config: Any) -> None:
    if config.critic.path is not None and config.ppo.shared_trunk:
        raise UserError(
            f"{option('critic.path')} is {config.critic.path!r}, but {option('ppo.shared_trunk')} gives the critic "
            f"the policy's "
            f"trunk; use {flag('critic.path')}=None or {flag('ppo.shared_trunk')}=False"
        )
    if config.critic.head == "reward_model" and config.ppo.shared_trunk:
        raise UserError(
            f"{option('critic.head')} is 'reward_model', but {option('ppo.shared_trunk')} gives the critic the "
            f"policy's trunk; use {flag('critic.head')}=zero or {flag('ppo.shared_trunk')}=False"
        )
    check_has_rewards(config, "there is nothing to learn from")
    check_origins(config)
    check_is_policy(config)
