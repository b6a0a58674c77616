"""The jitted programs of a PPO step with abstract sharded inputs, in the order in which a step runs them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms.ppo_one_pass import OnePassBatch
from jaxrm.algorithms.ppo_state import PPOBatch
from jaxrm.algorithms.reward_config import naming_source, sources_of
from jaxrm.inference import sharded_model
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import lora
from jaxrm.models.flops import forward_flops, training_flops
from jaxrm.models.generate import num_loops, refill_of
from jaxrm.models.quantized_params import count_parameters
from jaxrm.ops.reward_kinds import find_kind
from jaxrm.planning.abstract import BASE, Program, StagePrograms, abstract_batch
from jaxrm.planning.lengths import Lengths
from jaxrm.planning.ppo_scoring import scoring_program, shard_classifier, shard_reward_model
from jaxrm.planning.ppo_stage import PPOStage, cache_of_rollout, read_of_cache
from jaxrm.runtime.checkpoint import with_shardings
from jaxrm.sharding.mesh import batch_shards
from jaxrm.stage_config import PPO
from jaxrm.stages.ppo.learner import open_learner
from jaxrm.types import TokenBatch


def build(config: PPO, mesh: Mesh, decoder: ShardedModel, lengths: Lengths | None = None) -> StagePrograms:
    """The programs of a PPO step; ``lengths`` of prompts and responses, None for the longest."""
    critic = None
    if config.ppo.has_values and not config.ppo.shared_trunk:
        critic = sharded_model.shard_scalar_model(config.model, mesh, decoder.config, lora=decoder.lora)
    learner = open_learner(config, mesh, decoder, critic, num_steps=config.num_steps or 1000, end_ids=(0,))
    base = with_shardings(decoder.frozen_shapes, decoder.frozen_shardings)
    reference = with_shardings(decoder.trained_shapes, decoder.trained_shardings)
    reference = reference if base else _in_dtype(reference, config.model.dtype)
    limit = config.rollout.sampling.max_new_tokens
    lengths = lengths or Lengths(config.data.max_length - limit, limit)
    programs = learner.programs(_NoRewards())
    stage = PPOStage(config, mesh, learner, programs, learner.abstract, base, reference, lengths)
    residents = {"policy": stage.state.policy, "reference": reference} | ({BASE: base} if base else {})
    is_one_pass = stage.jitted.one_pass is not None
    step_programs = [*_rollout(stage), _reference_log_probs(stage) if is_one_pass else _log_probs(stage)]
    if stage.state.critic is not None:
        residents["critic"] = stage.state.critic
    paths: set[str] = set()
    readings: set[tuple[str, bool]] = set()
    for name, source in sources_of(config).items():
        if source.model is None:  # what scores text needs no device
            continue
        with naming_source(config, name):
            kind, suffix = find_kind(source.kind), f" {name}" if config.rewards else ""
            classifier = shard_classifier(config, mesh, source)
        if classifier is not None:
            model = classifier
            resident = whole = with_shardings(model.read_only_shapes, model.shardings)
        else:
            model = shard_reward_model(config, mesh, decoder, kind)
            trained = with_shardings(model.trained_shapes, model.trained_shardings)
            resident = trained if base else _in_dtype(trained, config.model.dtype)
            whole = lora.join(with_shardings(model.frozen_shapes, model.frozen_shardings), resident)
        if source.model not in paths:  # two sources of one model hold it once
            residents[f"reward model{suffix}"] = resident
        reading = source.model, kind.needs_correction  # one serves all kinds but that of corrections
        if reading not in readings:
            step_programs.append(scoring_program(stage, model, kind, whole, f"scoring{suffix}"))
        paths.add(source.model)
        readings.add(reading)
    if is_one_pass:
        step_programs.append(_update(stage))
    else:
        step_programs.append(_policy_update(stage))
        if stage.state.critic is not None:
            step_programs.append(_critic_update(stage))
    counts = count_parameters(decoder.shapes), count_parameters(decoder.trained_shapes)
    return StagePrograms(tuple(step_programs), residents, *counts, decoder.config, decoder.kernels)


def _rollout(stage: PPOStage) -> list[Program]:
    """Generation, after a copy of the policy to the rollout's mesh where that is another one."""
    sampler, rollout_model, params = stage.jitted.rollout, stage.learner.rollout_model, stage.policy_params
    programs, resident, copied = [], params, None
    if sampler.reshard is not None:
        programs.append(Program("reshard", sampler.reshard.params, (params,), 0, params, 0.0))
        params = with_shardings(jax.eval_shape(sampler.reshard.params, params), rollout_model.shardings)
        resident, copied = None, params  # the copy exists only while this program runs
    rows, num_prompts = stage.batch_size, stage.num_prompts
    prompts = [
        stage.rows((num_prompts, stage.prompt_length), dtype, mesh=rollout_model.mesh)
        for dtype in (jnp.int32, jnp.bool_)
    ]
    n = stage.config.rollout.responses_per_prompt
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (num_prompts, n)))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(rollout_model.mesh, PartitionSpec()))
    steps, trips = _decoding_steps(stage, rollout_model.mesh)
    programs.append(
        Program(
            "rollout",
            sampler.sample,
            (params, *prompts, key),
            rows * stage.row_tokens,
            resident,
            rows * stage.row_flops(forward_flops) - (rows - num_prompts) * stage.prompt_flops(),
            while_trips=trips,
            cache_bytes=cache_of_rollout(stage, rollout_model.mesh),
            cache_read=read_of_cache(stage, rollout_model.mesh, steps),
            copied_parameters=copied,
        )
    )
    return programs


def _decoding_steps(stage: PPOStage, mesh: Mesh) -> tuple[float, int]:
    """Tokens that are written one after another, and those of a loop, were they spread over all loops.

    With slots there is a loop before each read of further prompts, and some after the last; with parts, one in each.
    """
    config, n = stage.config.rollout, stage.config.rollout.responses_per_prompt
    if config.slots is None or config.slots == stage.batch_size:
        prompts = stage.num_prompts // config.num_microbatches
        steps = stage.lengths.decoding_steps(prompts, n, prompts)
        return steps, max(1, round(steps))
    groups = config.slots // n
    steps = stage.lengths.decoding_steps(stage.num_prompts, n, groups)
    loops = num_loops(stage.num_prompts, groups, n, refill_of(groups, batch_shards(mesh)))
    return steps, max(1, round(steps / loops))


def _log_probs(stage: PPOStage) -> Program:
    """Log-probs of policy and reference, and values of the critic."""
    critic = None if stage.state.critic is None else stage.state.critic.params
    value_flops = 0.0 if critic is None else stage.row_flops(forward_flops, scalar_head=True)
    models = (stage.state.policy.params, critic, stage.reference)
    return Program(
        "log_probs",
        stage.jitted.log_probs,
        (stage.base, *models, stage.packed_responses(stage.batch_size)),
        stage.batch_size * stage.row_tokens,
        (stage.base, *models),
        stage.batch_size * (2 * stage.row_flops(forward_flops) + value_flops),
    )


def _reference_log_probs(stage: PPOStage) -> Program:
    """Log-probs of the reference alone, where the update is in one pass."""
    return Program(
        "log_probs",
        stage.jitted.reference_log_probs,
        (stage.base, stage.reference, stage.packed_responses(stage.batch_size)),
        stage.batch_size * stage.row_tokens,
        (stage.base, stage.reference),
        stage.batch_size * stage.row_flops(forward_flops),
    )


def _policy_update(stage: PPOStage) -> Program:
    """One update of the policy on a minibatch, with its share of pre-training texts where there are any (PTX)."""
    tokens = stage.minibatch_size * stage.row_tokens
    model_flops = stage.minibatch_size * stage.row_flops(training_flops)
    batch, ptx = PPOBatch(stage.rollout()), stage.config.ptx
    if ptx is not None:
        texts = abstract_batch(TokenBatch, ptx.batch_size, ptx.max_length, stage.mesh)
        batch = dataclasses.replace(batch, ptx=texts, ptx_weight=stage.rows((ptx.batch_size,), jnp.float32))
        tokens += ptx.batch_size * ptx.max_length
        decoder, length = stage.learner.decoder, ptx.max_length
        model_flops += ptx.batch_size * training_flops(decoder.config, length, predicted=length, lora=decoder.lora)
    return Program(
        "policy update",
        stage.jitted.update_policy,
        (stage.state.policy, stage.frozen.policy, batch),
        tokens,
        (stage.state.policy, stage.frozen.policy),
        model_flops,
        times=stage.updates,
    )


def _update(stage: PPOStage) -> Program:
    """The only update of a step, of policy and critic in one pass."""
    states, base = {"policy": stage.state.policy}, stage.base
    flops = stage.row_flops(training_flops)
    if stage.state.critic is not None:
        states["critic"] = stage.state.critic
        flops += stage.row_flops(training_flops, scalar_head=True)
    rows = stage.rows((stage.batch_size, stage.response_length), jnp.float32)
    responses, ptx = stage.packed_responses(stage.batch_size), stage.config.ptx
    batch = OnePassBatch(responses, rows, stage.token_rewards(), rows)
    tokens, model_flops = stage.batch_size * stage.row_tokens, stage.batch_size * flops
    if ptx is not None:
        batch = dataclasses.replace(batch, ptx=abstract_batch(TokenBatch, ptx.batch_size, ptx.max_length, stage.mesh))
        tokens += ptx.batch_size * ptx.max_length
        decoder, length = stage.learner.decoder, ptx.max_length
        model_flops += ptx.batch_size * training_flops(decoder.config, length, predicted=length, lora=decoder.lora)
    return Program(
        "update",
        stage.jitted.one_pass,
        (states, base, stage.state.feedback, batch),
        tokens,
        (states, base),
        model_flops,
    )


def _critic_update(stage: PPOStage) -> Program:
    """One update of the critic on a minibatch."""
    return Program(
        "critic update",
        stage.jitted.update_critic,
        (stage.state.critic, stage.frozen.critic, PPOBatch(stage.rollout())),
        stage.minibatch_size * stage.row_tokens,
        (stage.state.critic, stage.frozen.critic),
        stage.minibatch_size * stage.row_flops(training_flops, scalar_head=True),
        times=stage.updates,
    )


def _in_dtype(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree)


class _NoRewards:
    """A plan computes no rewards."""

    needs_reference = False

    def __call__(self, calibration: Any, batch: Any, reference_log_probs: Any) -> Any:
        raise AssertionError("a plan computes no rewards")
