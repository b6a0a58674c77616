"""What the programs of a PPO step share in a plan: shapes, counts and caches."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrm.algorithms import ppo, scoring
from jaxrm.algorithms.ppo_state import PPOState
from jaxrm.algorithms.rollout import FrozenParams
from jaxrm.algorithms.row_packing import groups_of, plan_packing
from jaxrm.models import cached_attention
from jaxrm.models.cache import bytes_of_a_token
from jaxrm.models.flops import forward_flops
from jaxrm.planning.lengths import Lengths
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards
from jaxrm.stage_config import PPO
from jaxrm.stages.ppo.learner import Learner
from jaxrm.types import ResponseBatch, Rollout, RowPacking, TokenRewards


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
      lengths: of prompts and responses.
    """

    config: PPO
    mesh: Mesh
    learner: Learner
    jitted: ppo.Programs
    state: PPOState
    base: Any
    reference: Any
    lengths: Lengths

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

    @property
    def row_tokens(self) -> int:
        """Tokens of a prompt with its response."""
        return round(self.lengths.prompt + self.lengths.mean)

    def row_flops(self, flops: Callable[..., float], *, scalar_head: bool = False) -> float:
        """FLOPs of a pass over one prompt and response: ``flops`` is `forward_flops` or `training_flops`."""
        decoder, predicted = self.learner.decoder, round(self.lengths.mean)
        return flops(decoder.config, self.row_tokens, predicted=predicted, scalar_head=scalar_head, lora=decoder.lora)

    def prompt_flops(self) -> float:
        """FLOPs of a pass over one prompt, which the responses to it share."""
        decoder = self.learner.decoder
        return forward_flops(decoder.config, round(self.lengths.prompt), predicted=0, lora=decoder.lora)

    def rows(self, shape: tuple[int, ...], dtype: Any, *, mesh: Mesh | None = None) -> Any:
        """An abstract array whose first axis is that of the batch, on the stage's mesh or another."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=partition.batch_sharding(mesh or self.mesh))

    def responses(self, rows: int) -> ResponseBatch:
        """An abstract batch of prompts and responses."""
        lengths = (self.prompt_length, self.response_length)
        return ResponseBatch(*(self.rows((rows, n), dtype) for n in lengths for dtype in (jnp.int32, jnp.bool_)))

    def packed_responses(self, rows: int) -> ResponseBatch:
        """The same as the learner packs it; padded where that is switched off, or rows are full."""
        batch = self.responses(rows)
        if not self.config.ppo.packing:
            return batch
        shards = batch_shards(self.mesh)
        groups = groups_of(rows, shards, self.config.num_microbatches)
        prompts = np.full(rows, round(self.lengths.prompt))
        layout = plan_packing(
            batch, prompts, self.lengths.drawn(rows), groups, self.learner.networks.pad_to_multiple_of
        )
        if layout is None:
            return batch
        return dataclasses.replace(batch, packing=RowPacking(self.rows((rows,), jnp.int32), shards, *layout[1:]))

    def token_rewards(self) -> TokenRewards:
        """Abstract token rewards of a batch."""
        shape = (self.batch_size, self.response_length)
        numbers, flags = self.rows(shape, jnp.float32), self.rows(shape, jnp.bool_)
        diagnose = functools.partial(scoring.diagnose, end_ids=(0,))
        diagnostics = {
            name: self.rows(x.shape, x.dtype)
            for name, x in jax.eval_shape(diagnose, numbers, flags, self.responses(self.batch_size)).items()
        }
        rewards = TokenRewards(numbers, numbers, flags, flags, diagnostics)
        return dataclasses.replace(rewards, parts=dict.fromkeys(self.config.rewards, rewards))

    def rollout(self) -> Rollout:
        """An abstract minibatch of a rollout."""
        rows = self.minibatch_size
        arrays = [self.rows((rows, self.response_length), jnp.float32) for _ in range(5)]
        rollout = Rollout(self.packed_responses(rows), *arrays)
        if self.config.ppo.importance_cap is not None:
            rollout = dataclasses.replace(rollout, sampler_log_probs=arrays[0])
        return rollout if self.config.ppo.has_values else dataclasses.replace(rollout, values=None, returns=None)


def cache_of_rollout(stage: PPOStage, mesh: Mesh) -> float:
    """Keys and values of every layer, rows over the batch axes and heads over the tensor axis where they divide.

    Responses to one prompt share its keys and values.
    """
    rollout = stage.config.rollout
    rows = rollout.slots or stage.batch_size // rollout.num_microbatches
    prompts = rows // rollout.responses_per_prompt
    slots = prompts * stage.prompt_length + rows * stage.response_length
    return cache_of_slots(stage, mesh, prompts, slots, rollout.cache)


def read_of_cache(stage: PPOStage, mesh: Mesh, steps: float) -> float:
    """Share of the cache that a kernel reads at a step: no blocks in which a row sees no token, nor rows that ended.

    Args:
      stage: the stage.
      mesh: that responses are written on.
      steps: of decoding, in each part of the batch.
    """
    config, rollout, lengths = stage.learner.decoder.config, stage.config.rollout, stage.lengths
    heads = config.num_kv_heads // (mesh.shape["tensor"] if config.num_kv_heads % mesh.shape["tensor"] == 0 else 1)
    platform, itemsize = mesh.devices.flat[0].platform, jnp.dtype(stage.config.model.dtype).itemsize

    def block(slots: int) -> int:
        return cached_attention.block_size(platform, heads, config.head_dim, slots, itemsize)

    n, longest, limit = rollout.responses_per_prompt, stage.prompt_length, stage.response_length
    prompts = stage.num_prompts // rollout.num_microbatches
    groups = prompts if rollout.slots is None else rollout.slots // n
    shared = min(-(-round(lengths.prompt) // block(longest)) * block(longest), longest)
    read = prompts * (n * lengths.tokens_read(block(limit)) + lengths.longest(n) * shared)
    return min(1.0, read / (max(1.0, steps) * groups * (n * limit + longest)))


def cache_of_slots(stage: PPOStage, mesh: Mesh, rows: int, slots: float, stored: str = "compute") -> float:
    """Bytes on a device of a cache with room for so many tokens in all, in ``rows`` rows."""
    config = stage.learner.decoder.config
    shards = batch_shards(mesh) if rows % batch_shards(mesh) == 0 else 1
    shards *= mesh.shape["tensor"] if config.num_kv_heads % mesh.shape["tensor"] == 0 else 1
    itemsize = jnp.dtype(stage.config.model.dtype).itemsize
    return slots * bytes_of_a_token(config, itemsize, stored) / shards
