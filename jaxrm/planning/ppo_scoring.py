"""The program of a PPO step that scores its responses, in a plan: one of each reward model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import scoring
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.errors import naming, option
from jaxrm.inference import sharded_model
from jaxrm.inference.open_classifier import classifier_source
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import hub
from jaxrm.models.flops import forward_flops
from jaxrm.ops import reward_scaling
from jaxrm.ops.reward_kinds import Kind
from jaxrm.planning.abstract import Program
from jaxrm.planning.ppo_stage import PPOStage, cache_of_slots
from jaxrm.sharding import partition
from jaxrm.stage_config import PPO
from jaxrm.stages.rewards.classifier import names_classifier

# Tokens of the request to a seq2seq reward model for its correction. Its tokenizer is not read, so this is a guess.
REQUEST_TOKENS = 16


def scoring_program(stage: PPOStage, model: ShardedModel, kind: Kind, weights: Any, name: str) -> Program:
    """Token rewards of a reward model."""
    config, rows = stage.config, stage.batch_size
    sharding = partition.batch_sharding(stage.mesh)
    step = scoring.build_score_step(
        _scorer(stage.mesh, model, kind),
        params_sharding=model.shardings,
        batch_sharding=sharding,
        output_sharding=sharding,
        num_microbatches=config.num_microbatches,
    )
    replicated = NamedSharding(stage.mesh, PartitionSpec())
    calibration = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        jax.eval_shape(reward_scaling.uncalibrated),
    )
    reference = stage.rows((rows, stage.response_length), jnp.float32) if kind.needs_reference else None
    is_scalar = kind.needs == "scalar"
    length = config.data.max_length
    if kind.needs == "seq2seq":  # which reads the response, the request, and the correction
        length += REQUEST_TOKENS + stage.response_length
    predicted = 1 if kind.reads == "response" else stage.response_length
    program = Program(
        name,
        step,
        (weights, calibration, stage.responses(rows), reference),
        rows * length,
        weights,
        rows * forward_flops(model.config, length, predicted=predicted, scalar_head=is_scalar, lora=model.lora),
    )
    if not kind.needs_correction:
        return program
    rows_at_once = rows // config.num_microbatches
    cache_bytes = cache_of_slots(stage, stage.mesh, rows_at_once, rows_at_once * length)
    return dataclasses.replace(program, while_trips=stage.response_length - 1, cache_bytes=cache_bytes)


def shard_classifier(config: PPO, mesh: Mesh, source: RewardConfig) -> ShardedModel | None:
    """The classifier of the hub that a source names, by its config.json; None where it names a run."""
    if source.model is None or not names_classifier(source.model):
        return None
    given = classifier_source(
        source.model, source.classifier, dtype=config.model.dtype, attention=config.model.attention
    )
    with naming({"model.path": option("reward.model")}):
        return sharded_model.shard_scalar_model(given, mesh, hub.read_classifier_config(source.model))


def shard_reward_model(config: PPO, mesh: Mesh, decoder: ShardedModel, kind: Kind) -> ShardedModel:
    """A reward model of the policy's shape, of the sort that the kind belongs to."""
    if kind.needs != "scalar":
        return decoder
    return sharded_model.shard_scalar_model(config.model, mesh, decoder.config, lora=decoder.lora)


def _scorer(mesh: Mesh, model: ShardedModel, kind: Kind) -> scoring.Scorer:
    return scoring.build_scorer(
        kind,
        model.graphdef,
        request=tuple(range(1, REQUEST_TOKENS + 1)),
        end_ids=(0,),
        pad_to_multiple_of=sharded_model.pad_to_multiple_of(mesh),
    )
