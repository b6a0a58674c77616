"""The jitted programs of a stage as they will be, with arrays that have a shape and a place but no content.

What is planned is what runs: the programs come from the builders that the stages use.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import dpo, scalar_rm, scoring, seq2seq_rm, sft, train_step
from jaxrm.algorithms.optimizer import build_optimizer
from jaxrm.algorithms.ppo_state import PPOBatch
from jaxrm.algorithms.state import create
from jaxrm.errors import UserError, option
from jaxrm.experiment import Experiment
from jaxrm.inference import sharded_model
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import build
from jaxrm.models.config import ModelConfig
from jaxrm.models.flops import forward_flops, training_flops_per_token
from jaxrm.ops import reward_scaling
from jaxrm.ops.token_rewards import find_kind
from jaxrm.runtime.checkpoint import with_shardings
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards, check_batch, check_row_length
from jaxrm.stages.ppo.learner import open_learner
from jaxrm.types import ComparisonBatch, MappingBatch, ResponseBatch, Rollout, TokenBatch

REQUEST = 16  # tokens that ask a seq2seq reward model for its correction, about
PLANNED = ("sft", "seq2seq_rm", "scalar_rm", "dpo", "ppo")


@dataclass(frozen=True)
class Program:
    """One jitted program.

    Attributes:
      name: what it does.
      jitted: has ``trace``.
      arguments: abstract, each with its sharding.
      tokens: that it trains on, reads or writes, padding included.
      shared: those of its arguments that stay on the devices anyway.
      model_flops: that the work asks for on all devices, recomputation left out, counted by hand.
      while_trips: how often a loop runs at most whose length only the data tell; None where there is none.
      cache: bytes on a device of the keys and values of what was read.
      times: how often a step runs it.
      copied: bytes on a device of parameters that are there for it alone.
    """

    name: str
    jitted: Any
    arguments: tuple[Any, ...]
    tokens: int
    shared: Any
    model_flops: float
    while_trips: int | None = None
    cache: float = 0.0
    times: int = 1
    copied: float = 0.0


@dataclass(frozen=True)
class Programs:
    """The programs of a stage, and what stays on the devices between them.

    Attributes:
      programs: in the order in which a step runs them.
      residents: abstract pytrees by name: states, frozen models.
      parameters: of the largest model.
      shape: of its decoder.
    """

    programs: tuple[Program, ...]
    residents: Mapping[str, Any]
    parameters: int
    shape: ModelConfig

    def beside(self, program: Program) -> float:
        """Bytes on a device that stay there while a program runs and are none of its arguments."""
        return device_bytes(dict(self.residents)) - device_bytes(program.shared)


def device_bytes(tree: Any) -> float:
    """Bytes that abstract arrays take on one device; what lies in the memory of its host takes none."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != partition.HOST_MEMORY]
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _item_bytes(leaf.dtype) for leaf in leaves))


def stage_programs(config: Experiment, mesh: Mesh) -> Programs:
    """The programs of a stage on a mesh, whose devices need not exist; nothing is allocated, no weights are read.

    Raises:
      UserError: for an algorithm that has no plan, or a model or batch that does not fit the mesh.
    """
    if config.algorithm not in PLANNED:
        raise UserError(f"{option('algorithm')} is {config.algorithm!r}; what can be planned is {', '.join(PLANNED)}")
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    decoder = sharded_model.shard_model(config.model, mesh)
    build.check_length(decoder.config, "data.max_length", config.data.max_length)
    return _ppo(config, mesh, decoder) if config.algorithm == "ppo" else _supervised(config, mesh, decoder)


def _supervised(config: Experiment, mesh: Mesh, decoder: ShardedModel) -> Programs:
    check_row_length(mesh, "data.max_length", config.data.max_length)
    model = decoder
    batch_type: type = TokenBatch
    loss_fn: train_step.LossFn
    if config.algorithm == "sft":
        loss_fn = sft.sft_loss(model.graphdef)
    elif config.algorithm == "seq2seq_rm":
        batch_type = MappingBatch
        loss_fn = seq2seq_rm.seq2seq_rm_loss(
            model.graphdef,
            correction_weight=config.mapping.correction_weight,
            identity_weight=config.mapping.identity_weight if config.mapping.identity else 0.0,
        )
    elif config.algorithm == "scalar_rm":
        model = sharded_model.shard_scalar_model(config.model, mesh, decoder.config)
        batch_type, loss_fn = ComparisonBatch, scalar_rm.scalar_rm_loss(model.graphdef, config.scalar_rm)
    else:
        batch_type, loss_fn = dpo.DPOBatch, dpo.policy_loss(model.graphdef, config.dpo)
    optimizer = build_optimizer(config.optimizer, config.num_steps or 1000)
    sharding = sharded_model.state_shardings(model, optimizer, mesh, offload=config.optimizer.offload)
    step = train_step.build_train_step(
        loss_fn,
        optimizer,
        state_sharding=sharding,
        batch_sharding=partition.batch_sharding(mesh),
        num_microbatches=config.num_microbatches,
    )
    state = with_shardings(
        jax.eval_shape(lambda params: create(params, optimizer, jax.random.key(0)), model.shapes), sharding
    )
    rows, length = config.data.batch_size, config.data.max_length
    batch = _batch(batch_type, rows, length, mesh)
    is_scalar = config.algorithm == "scalar_rm"
    needed = rows * length * training_flops_per_token(decoder.config, length, scalar_head=is_scalar)
    program = Program("train step", step, (state, batch), rows * length, state, needed)
    return Programs((program,), {"state": state}, _count(model), decoder.config)


def _ppo(config: Experiment, mesh: Mesh, decoder: ShardedModel) -> Programs:
    critic = None if config.ppo.shared_trunk else sharded_model.shard_scalar_model(config.model, mesh, decoder.config)
    learner = open_learner(config, mesh, decoder, critic, num_steps=config.num_steps or 1000, end_ids=(0,))
    programs, state = learner.programs(_no_reward), learner.abstract
    new, rows, parts = config.rollout.sampling.max_new_tokens, config.data.batch_size, config.ppo.num_minibatches
    width = config.data.max_length - new
    of_rows, answering_rows = partition.batch_sharding(mesh), partition.batch_sharding(learner.rollout_model.mesh)

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any = of_rows) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def responses(rows: int) -> ResponseBatch:
        return ResponseBatch(*(array((rows, size), dtype) for size in (width, new) for dtype in (jnp.int32, jnp.bool_)))

    frozen = _in_dtype(with_shardings(decoder.shapes, decoder.shardings), config.model.dtype)
    params = learner.networks.decoder_params(state.policy.params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(
        key.shape, key.dtype, sharding=NamedSharding(learner.rollout_model.mesh, PartitionSpec())
    )
    critic_params = None if state.critic is None else state.critic.params
    share, updates = rows // parts, parts * config.ppo.num_epochs
    rollout = Rollout(responses(share), *(array((share, new), jnp.float32) for _ in range(5)))
    batch = PPOBatch(rollout)
    if config.ptx is not None:
        ptx = _batch(TokenBatch, config.ptx.batch_size, config.ptx.max_length, mesh)
        batch = PPOBatch(rollout, ptx, array((config.ptx.batch_size,), jnp.float32))
    forward = functools.partial(forward_flops, decoder.config)
    of_words = forward(width + new, predicted=new)
    of_values = 0.0 if state.critic is None else forward(width + new, predicted=new, scalar_head=True)
    respond, found, rollout_model, stays = programs.respond, [], params, params
    if respond.reshard is not None:
        found.append(Program("reshard", respond.reshard.params, (params,), 0, params, 0.0))
        rollout_model = with_shardings(jax.eval_shape(respond.reshard.params, params), learner.rollout_model.shardings)
        stays = None  # what answers is a copy, which lives as long as this program
    found += [
        Program(
            "respond",
            respond.draw,
            (rollout_model, *(array((rows, width), dtype, answering_rows) for dtype in (jnp.int32, jnp.bool_)), key),
            rows * (width + new),
            stays,
            rows * of_words,
            while_trips=new - 1,
            cache=_cache_bytes(decoder.config, rows, width + new, config.model.dtype, learner.rollout_model.mesh),
            copied=0.0 if respond.reshard is None else device_bytes(rollout_model),
        ),
        Program(
            "read",
            programs.read,
            (state.policy.params, critic_params, frozen, responses(rows)),
            rows * (width + new),
            (state.policy.params, critic_params, frozen),
            rows * (2 * of_words + of_values),
        ),
    ]
    residents = {"policy": state.policy, "reference": frozen}
    if state.critic is not None:
        residents["critic"] = state.critic
    if config.reward.function is None:
        model, scorer = _scorer(config, mesh, decoder)
        weights = _in_dtype(with_shardings(model.shapes, model.shardings), config.model.dtype)
        residents["reward model"] = weights
        step = scoring.build_score_step(
            scorer,
            params_sharding=model.shardings,
            batch_sharding=of_rows,
            output_sharding=of_rows,
            num_microbatches=config.num_microbatches,
        )
        calibration = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=learner.copied),
            jax.eval_shape(reward_scaling.uncalibrated),
        )
        reference = array((rows, new), jnp.float32) if find_kind(config.reward.kind).needs_reference else None
        asked = (weights, calibration, responses(rows), reference)
        is_scalar = find_kind(config.reward.kind).needs == "scalar"
        row = width + new if is_scalar else width + new + REQUEST + new
        of_row = forward(row, predicted=1 if is_scalar else new, scalar_head=is_scalar)
        found.append(Program("score", step, asked, rows * row, weights, rows * of_row))
    of_update, of_ptx, ptx_flops = share * (width + new), 0, 0.0
    if config.ptx is not None:
        of_ptx = config.ptx.batch_size * config.ptx.max_length
        ptx_flops = of_ptx * training_flops_per_token(decoder.config, config.ptx.max_length)
    found.append(
        Program(
            "update policy",
            programs.update_policy,
            (state.policy, batch),
            of_update + of_ptx,
            state.policy,
            3 * share * of_words + ptx_flops,
            times=updates,
        )
    )
    if state.critic is not None:
        found.append(
            Program(
                "update critic",
                programs.update_critic,
                (state.critic, PPOBatch(rollout)),
                of_update,
                state.critic,
                3 * share * of_values,
                times=updates,
            )
        )
    return Programs(tuple(found), residents, _count(decoder), decoder.config)


def _scorer(config: Experiment, mesh: Mesh, decoder: ShardedModel) -> tuple[ShardedModel, scoring.Scorer]:
    """A reward model of the policy's shape, of the sort that the kind belongs to."""
    kind, model = find_kind(config.reward.kind), decoder
    if kind.needs == "scalar":
        model = sharded_model.shard_scalar_model(config.model, mesh, decoder.config)
    return model, scoring.build_scorer(
        kind,
        model.graphdef,
        request=tuple(range(1, REQUEST + 1)),
        end_ids=(0,),
        pad_to_multiple_of=sharded_model.pad_to_multiple_of(mesh),
    )


def _batch(batch_type: type, rows: int, length: int, mesh: Mesh) -> Any:
    """An abstract batch; masks are bool, reference log-probs float32, the rest int32, as the loaders give them."""
    place = partition.batch_sharding(mesh)
    kinds = {"loss_mask": jnp.bool_, "is_correction": jnp.bool_, "is_chosen_end": jnp.bool_}
    return batch_type(
        **{
            field.name: jax.ShapeDtypeStruct(
                (rows, length),
                jnp.float32 if field.name.startswith("reference_") else kinds.get(field.name, jnp.int32),
                sharding=place,
            )
            for field in dataclasses.fields(batch_type)
        }
    )


def _cache_bytes(config: ModelConfig, rows: int, length: int, dtype: str, mesh: Mesh) -> float:
    """Keys and values of every layer, rows over the batch axes and heads over the tensor axis where they divide."""
    shards = batch_shards(mesh) if rows % batch_shards(mesh) == 0 else 1
    shards *= mesh.shape["tensor"] if config.num_kv_heads % mesh.shape["tensor"] == 0 else 1
    size = 2 * config.num_layers * rows * length * config.num_kv_heads * config.head_dim
    return size * jnp.dtype(dtype).itemsize / shards


def _in_dtype(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree)


def _item_bytes(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


def _count(model: ShardedModel) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))


def _no_reward(calibration: Any, batch: Any, reference_log_probs: Any) -> Any:
    raise AssertionError("a plan pays nothing")
