"""Where the critic of a PPO run starts from."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrm.data.tokenizer import load_tokenizer, vocabulary_conflict
from jaxrm.errors import UserError, flag, option
from jaxrm.experiment import Experiment
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.load import as_trained
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.inference.weights import find_checkpoint
from jaxrm.models import heads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CRITIC_TRUNKS = ("scalar_rm", "sft", "ppo", "dpo")


def open_critic(
    config: Experiment, policy: ShardedModel, mesh: Mesh, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[ShardedModel, Callable[[jax.Array], Any], str]:
    """The critic's model, the function that makes its first parameters given a key, and where they come from.

    The trunk is that of ``config.critic.path``; without it, that of the scalar reward model where rewards come from
    one, else the policy's. The head starts at 0: until it has learned, advantages are those of the rewards alone
    (jaxrm choice).

    Args:
      config: the whole config.
      policy: whose responses it reads.
      mesh: the devices.
      tokenizer: of the policy.

    Raises:
      UserError: where ``config.critic.path`` has no such run, or one that cannot read the policy's tokens.
    """
    found = None
    if config.critic.path is not None:
        found = find_checkpoint(config.critic.path, "critic.path", CRITIC_TRUNKS)
        conflict = vocabulary_conflict(load_tokenizer(str(found.folder.tokenizer)), tokenizer)
        if conflict is None and len(tokenizer) > found.shape.vocab_size:
            conflict = f"the policy has {len(tokenizer)} tokens and the critic {found.shape.vocab_size}"
        if conflict is not None:
            raise UserError(
                f"{option('critic.path')} is {found.name}, whose vocabulary is not that of the policy: {conflict}; "
                f"required "
                f"a run with the policy's tokenizer, or the policy itself, {flag('critic.path')}=None"
            )
        if found.shape.max_position < config.data.max_length:
            raise UserError(
                f"{option('data.max_length')} is {config.data.max_length}, but the critic's model, {found.name}, "
                f"reads at "
                f"most {found.shape.max_position} tokens; e.g. {flag('data.max_length')}={found.shape.max_position}"
            )
    elif config.reward.model is not None:
        reward_model = find_checkpoint(config.reward.model, "reward.model", weights.REWARD_MODELS)
        found = reward_model if reward_model.config.algorithm == "scalar_rm" else None

    if found is None:
        model = sharded_model.shard_scalar_model(config.model, mesh, policy.config)

        def of_policy(key: jax.Array) -> Any:
            trunk = weights.load_or_init_params(policy.config, config.model, key, policy.shapes, policy.shardings)
            return heads.from_decoder_params(trunk, zero_head(model))

        return model, of_policy, "the policy"

    run = found
    source = as_trained(run, config.model.dtype)
    computed = dataclasses.replace(source, remat=config.model.remat, attention=config.model.attention)
    model = sharded_model.shard_scalar_model(computed, mesh, run.shape)

    def of_run(key: jax.Array) -> Any:
        del key
        if run.config.algorithm == "scalar_rm":
            trunk = run.restore(model.shapes, model.shardings)["decoder"]
        else:
            decoder = sharded_model.shard_model(computed, mesh, run.shape)
            trunk = run.restore(decoder.shapes, decoder.shardings)
        return heads.from_decoder_params(trunk, zero_head(model))

    return model, of_run, run.name


def zero_head(model: ShardedModel) -> Any:
    """A value head that says 0 everywhere."""
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.shapes["scalar_head"]),
        out_shardings=model.shardings["scalar_head"],
    )
    return zeros()
