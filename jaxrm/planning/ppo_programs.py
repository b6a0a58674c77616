"""The jitted programs of a PPO step with abstract sharded inputs, in the order in which a step runs them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import ppo, scoring
from jaxrm.algorithms.ppo_one_pass import OnePassBatch
from jaxrm.algorithms.ppo_state import PPOBatch, PPOState
from jaxrm.algorithms.reward_config import RewardConfig, naming_source, sources_of
from jaxrm.algorithms.rollout import FrozenParams
from jaxrm.errors import naming, option
from jaxrm.inference import sharded_model
from jaxrm.inference.open_classifier import classifier_source
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import hub, lora
from jaxrm.models.flops import forward_flops, training_flops
from jaxrm.models.quantized_params import count_parameters
from jaxrm.ops import reward_scaling
from jaxrm.ops.token_rewards import Kind, find_kind
from jaxrm.planning.abstract import BASE, Program, StagePrograms, abstract_batch
from jaxrm.runtime.checkpoint import with_shardings
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards
from jaxrm.stage_config import PPO
from jaxrm.stages.ppo.learner import Learner, open_learner
from jaxrm.stages.rewards.classifier import names_classifier
from jaxrm.types import ResponseBatch, Rollout, TokenBatch, TokenRewards

# Tokens of the request to a seq2seq reward model for its correction. Its tokenizer is not read, so this is a guess.
REQUEST_TOKENS = 16


@dataclass(frozen=True)
class PPOStage:
    """What the programs of a PPO step share.

    Attributes:
      config: of the stage.
      mesh: of everything but the rollout.
      learner: of policy and critic.
      jitted: the jitted functions of a step.
      state: abstract, of policy and critic.
      base: abstract parameters under the adapters of all models, in the compute dtype; ``{}`` where they have none.
      reference: abstract parameters of the reference, in the compute dtype; its adapters where there is a base.
    """

    config: PPO
    mesh: Mesh
    learner: Learner
    jitted: ppo.Programs
    state: PPOState
    base: Any
    reference: Any

    @property
    def response_length(self) -> int:
        """``T``, most tokens of a response."""
        return self.config.rollout.sampling.max_new_tokens

    @property
    def prompt_length(self) -> int:
        """``P``, most tokens of a prompt."""
        return self.config.data.max_length - self.response_length

    @property
    def batch_size(self) -> int:
        """Responses of a step."""
        return self.config.data.batch_size

    @property
    def num_prompts(self) -> int:
        """Prompts of a step."""
        return self.batch_size // self.config.rollout.responses_per_prompt

    @property
    def minibatch_size(self) -> int:
        """Responses of an update."""
        return self.batch_size // self.config.ppo.num_minibatches

    @property
    def updates(self) -> int:
        """Updates of a step."""
        return self.config.ppo.num_minibatches * self.config.ppo.num_epochs

    @property
    def policy_params(self) -> Any:
        """Abstract parameters of the policy's decoder."""
        return self.learner.decoder_params(self.base, self.state.policy.params)

    @property
    def frozen(self) -> FrozenParams:
        """Abstract frozen parameters of policy and critic."""
        return self.learner.networks.frozen(self.base)

    def row_flops(self, flops: Callable[..., float], *, scalar_head: bool = False) -> float:
        """FLOPs of a pass over one prompt and response: ``flops`` is `forward_flops` or `training_flops`."""
        decoder, length = self.learner.decoder, self.config.data.max_length
        return flops(decoder.config, length, predicted=self.response_length, scalar_head=scalar_head, lora=decoder.lora)

    def prompt_flops(self) -> float:
        """FLOPs of a pass over one prompt, which the responses to it share."""
        decoder = self.learner.decoder
        return forward_flops(decoder.config, self.prompt_length, predicted=0, lora=decoder.lora)

    def rows(self, shape: tuple[int, ...], dtype: Any, *, mesh: Mesh | None = None) -> Any:
        """An abstract array whose first axis is that of the batch, on the stage's mesh or another."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=partition.batch_sharding(mesh or self.mesh))

    def responses(self, rows: int) -> ResponseBatch:
        """An abstract batch of prompts and responses."""
        lengths = (self.prompt_length, self.response_length)
        return ResponseBatch(*(self.rows((rows, n), dtype) for n in lengths for dtype in (jnp.int32, jnp.bool_)))

    def token_rewards(self) -> TokenRewards:
        """Abstract token rewards of a batch."""
        shape = (self.batch_size, self.response_length)
        names = ("sum", "mean", "length", "tag_rate", "divergence", "ended", "end_tag")
        numbers, flags = self.rows(shape, jnp.float32), self.rows(shape, jnp.bool_)
        diagnostics = {name: self.rows(shape[:1], jnp.float32) for name in names}
        rewards = TokenRewards(numbers, numbers, flags, flags, diagnostics)
        return dataclasses.replace(rewards, parts=dict.fromkeys(self.config.rewards, rewards))

    def rollout(self) -> Rollout:
        """An abstract minibatch of a rollout."""
        rows = self.minibatch_size
        arrays = [self.rows((rows, self.response_length), jnp.float32) for _ in range(5)]
        rollout = Rollout(self.responses(rows), *arrays)
        return rollout if self.config.ppo.has_values else dataclasses.replace(rollout, values=None, returns=None)


def build(config: PPO, mesh: Mesh, decoder: ShardedModel) -> StagePrograms:
    """The programs of a PPO step."""
    critic = None
    if config.ppo.has_values and not config.ppo.shared_trunk:
        critic = sharded_model.shard_scalar_model(config.model, mesh, decoder.config, lora=decoder.lora)
    learner = open_learner(config, mesh, decoder, critic, num_steps=config.num_steps or 1000, end_ids=(0,))
    base = with_shardings(decoder.frozen_shapes, decoder.frozen_shardings)
    reference = with_shardings(decoder.trained_shapes, decoder.trained_shardings)
    reference = reference if base else _in_dtype(reference, config.model.dtype)
    stage = PPOStage(config, mesh, learner, learner.programs(_NoRewards()), learner.abstract, base, reference)
    residents = {"policy": stage.state.policy, "reference": reference} | ({BASE: base} if base else {})
    is_one_pass = stage.jitted.one_pass is not None
    programs = [*_rollout(stage), _reference_log_probs(stage) if is_one_pass else _log_probs(stage)]
    if stage.state.critic is not None:
        residents["critic"] = stage.state.critic
    paths: set[str] = set()
    for name, source in sources_of(config).items():
        if source.model is None:  # what scores text needs no device
            continue
        with naming_source(config, name):
            kind, suffix = find_kind(source.kind), f" {name}" if config.rewards else ""
            classifier = _classifier(config, mesh, source)
        if classifier is not None:
            model = classifier
            resident = whole = with_shardings(model.read_only_shapes, model.shardings)
        else:
            model = _reward_model(config, mesh, decoder, kind)
            trained = with_shardings(model.trained_shapes, model.trained_shardings)
            resident = trained if base else _in_dtype(trained, config.model.dtype)
            whole = lora.join(with_shardings(model.frozen_shapes, model.frozen_shardings), resident)
        if source.model not in paths:  # two sources of one model hold it once
            residents[f"reward model{suffix}"] = resident
        paths.add(source.model)
        programs.append(_scoring(stage, model, _scorer(mesh, model, kind), kind, whole, f"scoring{suffix}"))
    if is_one_pass:
        programs.append(_update(stage))
    else:
        programs.append(_policy_update(stage))
        if stage.state.critic is not None:
            programs.append(_critic_update(stage))
    counts = count_parameters(decoder.shapes), count_parameters(decoder.trained_shapes)
    return StagePrograms(tuple(programs), residents, *counts, decoder.config)


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
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(rollout_model.mesh, PartitionSpec()))
    programs.append(
        Program(
            "rollout",
            sampler.sample,
            (params, *prompts, key),
            rows * stage.config.data.max_length,
            resident,
            rows * stage.row_flops(forward_flops) - (rows - num_prompts) * stage.prompt_flops(),
            while_trips=stage.response_length - 1,
            cache_bytes=_cache_bytes(stage, rollout_model.mesh),
            copied_parameters=copied,
        )
    )
    return programs


def _log_probs(stage: PPOStage) -> Program:
    """Log-probs of policy and reference, and values of the critic."""
    critic = None if stage.state.critic is None else stage.state.critic.params
    value_flops = 0.0 if critic is None else stage.row_flops(forward_flops, scalar_head=True)
    models = (stage.state.policy.params, critic, stage.reference)
    return Program(
        "log_probs",
        stage.jitted.log_probs,
        (stage.base, *models, stage.responses(stage.batch_size)),
        stage.batch_size * stage.config.data.max_length,
        (stage.base, *models),
        stage.batch_size * (2 * stage.row_flops(forward_flops) + value_flops),
    )


def _reference_log_probs(stage: PPOStage) -> Program:
    """Log-probs of the reference alone, where the update is in one pass."""
    return Program(
        "log_probs",
        stage.jitted.reference_log_probs,
        (stage.base, stage.reference, stage.responses(stage.batch_size)),
        stage.batch_size * stage.config.data.max_length,
        (stage.base, stage.reference),
        stage.batch_size * stage.row_flops(forward_flops),
    )


def _scoring(
    stage: PPOStage, model: ShardedModel, scorer: scoring.Scorer, kind: Kind, weights: Any, name: str
) -> Program:
    """Token rewards of a reward model."""
    config, rows = stage.config, stage.batch_size
    sharding = partition.batch_sharding(stage.mesh)
    step = scoring.build_score_step(
        scorer,
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
    if kind.reads != "kept":
        return program
    rows_at_once = rows // config.num_microbatches
    cache_bytes = _cache_of_slots(stage, stage.mesh, rows_at_once, rows_at_once * length)
    return dataclasses.replace(program, while_trips=stage.response_length - 1, cache_bytes=cache_bytes)


def _policy_update(stage: PPOStage) -> Program:
    """One update of the policy on a minibatch, with its share of pre-training texts where there are any (PTX)."""
    tokens = stage.minibatch_size * stage.config.data.max_length
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
    batch, ptx = OnePassBatch(stage.responses(stage.batch_size), rows, stage.token_rewards()), stage.config.ptx
    tokens, model_flops = stage.batch_size * stage.config.data.max_length, stage.batch_size * flops
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
        stage.minibatch_size * stage.config.data.max_length,
        (stage.state.critic, stage.frozen.critic),
        stage.minibatch_size * stage.row_flops(training_flops, scalar_head=True),
        times=stage.updates,
    )


def _classifier(config: PPO, mesh: Mesh, source: RewardConfig) -> ShardedModel | None:
    """The classifier of the hub that a source names, by its config.json; None where it names a run."""
    if source.model is None or not names_classifier(source.model):
        return None
    given = classifier_source(
        source.model, source.classifier, dtype=config.model.dtype, attention=config.model.attention
    )
    with naming({"model.path": option("reward.model")}):
        return sharded_model.shard_scalar_model(given, mesh, hub.read_classifier_config(source.model))


def _reward_model(config: PPO, mesh: Mesh, decoder: ShardedModel, kind: Kind) -> ShardedModel:
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


def _cache_bytes(stage: PPOStage, mesh: Mesh) -> float:
    """Keys and values of every layer, rows over the batch axes and heads over the tensor axis where they divide.

    Responses to one prompt share its keys and values.
    """
    parts = stage.config.rollout.num_microbatches
    slots = (stage.num_prompts * stage.prompt_length + stage.batch_size * stage.response_length) / parts
    return _cache_of_slots(stage, mesh, stage.num_prompts // parts, slots)


def _cache_of_slots(stage: PPOStage, mesh: Mesh, rows: int, slots: float) -> float:
    """Bytes on a device of a cache with room for so many tokens in all, in ``rows`` rows."""
    config = stage.learner.decoder.config
    shards = batch_shards(mesh) if rows % batch_shards(mesh) == 0 else 1
    shards *= mesh.shape["tensor"] if config.num_kv_heads % mesh.shape["tensor"] == 0 else 1
    size = 2 * config.num_layers * slots * config.num_kv_heads * config.head_dim
    return size * jnp.dtype(stage.config.model.dtype).itemsize / shards


def _in_dtype(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree)


class _NoRewards:
    """A plan computes no rewards."""

    needs_reference = False

    def __call__(self, calibration: Any, batch: Any, reference_log_probs: Any) -> Any:
        raise AssertionError("a plan computes no rewards")
