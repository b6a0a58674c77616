"""What a policy is paid: a source of token rewards, and their scale and centre on its own responses."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrm.algorithms import scoring
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample
from jaxrm.data.templates import end_ids
from jaxrm.errors import UserError, flag
from jaxrm.experiment import Experiment
from jaxrm.inference import sharded_model
from jaxrm.inference.load import open_reward_model
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.ops.reward_scaling import Calibration, uncalibrated
from jaxrm.ops.token_rewards import find_kind
from jaxrm.runtime.progress import Progress
from jaxrm.sharding import partition
from jaxrm.stages.inputs.prompts import check_judgeable, fixed_batches
from jaxrm.stages.rewards.sources import calibrate, check_reward_model, function_source, model_source, open_function
from jaxrm.types import ResponseBatch, TokenRewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_rewards(
    config: Experiment,
    mesh: Mesh,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[PromptExample],
    text: Callable[[Any], str],
) -> tuple[RewardSource, str]:
    """The reward model or function of ``config.reward`` as a source of token rewards, and its name for people.

    Args:
      config: the whole config.
      mesh: the devices.
      tokenizer: of the policy.
      examples: every prompt that it will be asked about.
      text: a response's ids as text.

    Raises:
      UserError: where there is none, or it cannot score the policy's responses to these prompts.
    """
    kind, template = find_kind(config.reward.kind), config.data.template
    if config.reward.model is None:
        name = str(config.reward.function)
        if name.startswith(tasks.PREFIX):
            check_judgeable(examples, name, "reward.function")
        return function_source(
            name,
            open_function(name),
            kind,
            messages={example.tokens.tobytes(): example.messages for example in examples},
            text=text,
            end_ids=tuple(sorted(end_ids(tokenizer, template))),
            mesh=mesh,
        ), name
    model = open_reward_model(
        config.reward.model, mesh, config.model.dtype, field="reward.model", attention=config.model.attention
    )
    length, response_length = config.data.max_length, config.rollout.sampling.max_new_tokens
    check_reward_model(model, kind, tokenizer, template, length, response_length)
    frozen = dataclasses.replace(model, params=sharded_model.in_compute_dtype(model.params, config.model.dtype))
    return model_source(frozen, kind, mesh, num_microbatches=config.num_microbatches), model.name


def scorer(
    config: Experiment, mesh: Mesh, policy: ShardedModel, params: Any, source: RewardSource
) -> Callable[[Calibration, ResponseBatch], TokenRewards]:
    """The source of rewards with the policy that answers as its own reference, which ``contrast`` compares with."""
    if not find_kind(config.reward.kind).needs_reference:
        return lambda calibration, batch: source(calibration, batch, jnp.zeros(()))  # which no other kind reads
    rows, multiple = partition.batch_sharding(mesh), sharded_model.pad_to_multiple_of(mesh)

    def log_probs(params: Any, batch: ResponseBatch) -> jax.Array:
        found = scoring.response_statistics(
            policy.graphdef,
            params,
            batch,
            None,
            pad_to_multiple_of=multiple,
            temperature=config.rollout.sampling.temperature or 1.0,
        ).log_probs
        return jnp.where(batch.response_mask, found, 0.0)

    read = jax.jit(log_probs, in_shardings=(policy.shardings, rows), out_shardings=rows)
    return lambda calibration, batch: source(calibration, batch, read(params, batch))


def calibration_of(
    config: Experiment,
    mesh: Mesh,
    examples: Sequence[PromptExample],
    width: int,
    draw: Callable[[jax.Array, jax.Array, jax.Array], ResponseBatch],
    score: Callable[[Calibration, ResponseBatch], TokenRewards],
    key: jax.Array,
    show: bool,
) -> Calibration:
    """Scale and centre of the rewards, from responses of the policy before it has learnt anything.

    Args:
      config: the whole config.
      mesh: the devices.
      examples: prompts; the first ones are answered.
      width: that prompts are padded to.
      draw: prompts, mask and key to a response each.
      score: from `scorer`.
      key: typed PRNG key.
      show: draw a bar.

    Raises:
      UserError: where the rewards are not finite.
    """
    rows = config.data.batch_size
    count = -(-config.reward.calibration_responses // rows) * rows
    some = [examples[i % len(examples)] for i in range(count)]
    rewards: list[TokenRewards] = []
    with Progress("calibrate", count, unit="responses", enabled=show) as progress:
        for number, (prompts, mask) in enumerate(fixed_batches(some, rows, width, mesh)):
            rewards.append(score(uncalibrated(), draw(prompts, mask, jax.random.fold_in(key, number))))
            jax.block_until_ready(rewards)
            progress.update((number + 1) * rows)
    kind = find_kind(config.reward.kind)
    calibration = calibrate(kind, rewards, scale=config.reward.scale, center=config.reward.center, mesh=mesh)
    if not all(map(math.isfinite, jax.tree.leaves(jax.device_get(calibration)))):
        raise not_finite("the responses that rewards are calibrated on")
    if config.reward.scale == "unit" and float(calibration.scale) == 1.0:
        print("warning: all responses of the SFT policy have the same reward, so there is nothing to scale or to learn")
    return calibration


def not_finite(where: str) -> UserError:
    """The error for rewards that are no finite numbers; ``where`` says of what."""
    return UserError(
        f"the rewards of {where} are not finite; the reward model is spoiled, give another, e.g. "
        f"{flag('reward.model')}=RUN_DIR/checkpoints/best"
    )
