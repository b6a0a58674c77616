"""Where the critic of a PPO run starts from."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxrm.algorithms.reward_config import naming_source, sources_of
from jaxrm.algorithms.state import TrainState
from jaxrm.data.tokenizer import unreadable_by
from jaxrm.errors import UserError, flag, option
from jaxrm.inference import parameters, sharded_model
from jaxrm.inference.base import recorded_base
from jaxrm.inference.load import as_trained
from jaxrm.inference.run_checkpoint import RunCheckpoint, find_checkpoint
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.inference.weights import trained_place
from jaxrm.models import heads
from jaxrm.stage_config import CRITIC_TRUNKS
from jaxrm.stages.rewards.sources import scalar_runs
from jaxrm.stages.stage import Stage


@dataclass(frozen=True)
class Critic:
    """The critic's model, and where its trunk comes from.

    Attributes:
      model: decoder and value head over the devices.
      name: where the trunk comes from, for people.
      run: whose trunk it is; None for the policy's.
      run_decoder: the decoder of that run over the devices, where its run holds a decoder alone.
      head_of: the source of rewards, by name, whose reward model's head it begins with; None for one that is 0.
    """

    model: ShardedModel
    name: str
    run: RunCheckpoint | None = None
    run_decoder: ShardedModel | None = None
    head_of: str | None = None

    def check_base(self, stage: Stage) -> None:
        """Refuse a trunk whose adapters stand on a base of another content than the policy's.

        Raises:
          UserError: naming both.
        """
        if self.run is not None and stage.model.lora.is_on and recorded_base(self.run).sha256 != stage.base.sha256:
            raise _cannot_share_base(stage.config, self.run)

    def init_params(self, stage: Stage, key: jax.Array) -> Any:
        """First parameters: the trunk, and a head that is 0 everywhere, or the reward model's (`calibrated`).

        Until a head of 0 has learned, advantages are those of the rewards alone (jaxrm choice).

        Args:
          stage: of the policy.
          key: typed PRNG key, for a policy that is drawn.
        """
        if self.run is None:
            trunk = stage.init_params(key)
        elif self.head_of is not None:
            return parameters.read_run(self.run, self.model)
        elif self.run_decoder is None:
            trunk = parameters.read_run(self.run, self.model)["decoder"]
        else:
            trunk = parameters.read_run(self.run, self.run_decoder)
        return heads.from_decoder_params(trunk, zero_head(self.model))

    def calibrated(self, state: TrainState, calibration: Any, weights: Mapping[str, float]) -> TrainState:
        """The first state in the units of the calibrated rewards, which a reward model's own head is not in.

        Args:
          state: with that head, or one that is 0.
          calibration: of the rewards; of a sum that of each source, by name.
          weights: of the sources of a sum; none for one source.
        """
        if self.head_of is None:
            return state
        head, own = state.params["scalar_head"], calibration[self.head_of] if weights else calibration
        scale_of_source = own.scale * weights.get(self.head_of, 1.0)
        scale = jax.jit(lambda head, scale: jax.tree.map(lambda x: x * scale, head), out_shardings=_shardings(head))
        return dataclasses.replace(state, params={**state.params, "scalar_head": scale(head, scale_of_source)})


def open_critic(stage: Stage) -> Critic:
    """The critic of a run, over the devices; nothing is allocated.

    The trunk is that of ``config.critic.path``; without it, that of the first source of rewards, by name, that is a run
    of a scalar reward model and has a weight, else the policy's. With adapters it stands on the policy's base.

    Raises:
      UserError: where ``config.critic.path`` has no such run, or one that cannot read the policy's tokens; or where the
        critic has adapters, and the run others, or another base.
    """
    config, run = stage.config, None
    if config.critic.path is not None:
        run = find_checkpoint(config.critic.path, "critic.path", CRITIC_TRUNKS)
        _check_reads_policy(stage, run)
    else:
        run = next(iter(scalar_runs(config).values()), None)
    if run is None:
        if config.critic.head == "reward_model":
            raise _no_head(config, "the critic starts from the policy, which has no such head")
        model = sharded_model.shard_scalar_model(config.model, stage.mesh, stage.model.config, lora=stage.model.lora)
        return Critic(model, "the policy")

    if stage.model.lora.is_on and (
        run.lora != stage.model.lora or parameters.stands_on_base_of(run, config.model, config.seed) is False
    ):
        raise _cannot_share_base(config, run)
    source = dataclasses.replace(
        as_trained(run, config.model.dtype),
        remat=config.model.remat,
        attention=config.model.attention,
        quantize=stage.model.source.quantize,
    )
    adapters = stage.model.lora
    model = sharded_model.shard_scalar_model(source, stage.mesh, run.shape, lora=adapters)
    is_scalar = run.config.algorithm == "scalar_rm"
    head_of = _source_of_head(config, run) if config.critic.head == "reward_model" else None
    decoder = None if is_scalar else sharded_model.shard_model(source, stage.mesh, run.shape, lora=adapters)
    return Critic(model, run.name, run, decoder, head_of=head_of)


def _source_of_head(config: Any, run: RunCheckpoint) -> str:
    """The source of rewards that the head of a run speaks for, by name: the only scalar reward model among them.

    Raises:
      UserError: where there is none, or more than one, or it is another run.
    """
    if run.config.algorithm != "scalar_rm":
        raise _no_head(config, f"the critic starts from {run.name}, a run of {run.config.algorithm}, which has no head")
    paying = scalar_runs(config)
    if len(paying) != 1:
        several = f"{' and '.join(paying)} are scalar reward models, of which a head says the rewards of one"
        raise _no_head(config, several if paying else "no source of the rewards is the run of a scalar reward model")
    ((name, source_run),) = paying.items()
    kind = sources_of(config)[name].kind
    if kind != "scalar":
        with naming_source(config, name):
            raise _no_head(config, f"{option('reward.kind')} is {kind}")
    if (source_run.folder.path.resolve(), source_run.step) != (run.folder.path.resolve(), run.step):
        raise _no_head(config, f"rewards come from {source_run.name} and the critic from {run.name}")
    return name


def _no_head(config: Any, reason: str) -> UserError:
    return UserError(
        f"{option('critic.head')} is {config.critic.head!r}, but {reason}; required is one scalar reward model among "
        f"the sources, of the kind scalar, from which the critic starts; e.g. {flag('critic.head')}=zero"
    )


def _cannot_share_base(config: Any, run: RunCheckpoint) -> UserError:
    """The error for a critic whose adapters could not be trained on the policy's base."""
    base = recorded_base(run) if run.lora.is_on else None
    stands = "all of its weights trained" if base is None else f"{run.lora}, on the base {base.path or base.preset}"
    given = f"is {config.critic.path!r}" if config.critic.path is not None else f"is None, which starts from {run.name}"
    return UserError(
        f"{option('critic.path')} {given}, a run with {stands}; required by {option('lora')} is {config.lora}, on the "
        f"policy's base; e.g. the policy, {flag('critic.path')}={trained_place(config.model)[1]}"
    )


def _check_reads_policy(stage: Stage, run: RunCheckpoint) -> None:
    config = stage.config
    conflict = unreadable_by(run.vocabulary()._replace(name="the critic"), stage.vocabulary)
    if conflict is not None:
        raise UserError(
            f"{option('critic.path')} is {run.name}, whose vocabulary is not that of the policy: {conflict}; "
            f"required "
            f"a run with the policy's tokenizer, or the policy itself, {flag('critic.path')}=None"
        )
    if run.shape.max_position < config.data.max_length:
        raise UserError(
            f"{option('data.max_length')} is {config.data.max_length}, but the critic's model, {run.name}, "
            f"reads at "
            f"most {run.shape.max_position} tokens; e.g. {flag('data.max_length')}={run.shape.max_position}"
        )


def zero_head(model: ShardedModel) -> Any:
    """A value head that is 0 everywhere."""
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.shapes["scalar_head"]),
        out_shardings=model.shardings["scalar_head"],
    )
    return zeros()


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
