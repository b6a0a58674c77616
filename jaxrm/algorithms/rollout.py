"""Rollouts: prompts to responses, and the log-probs and values that policy, reference and critic give their tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.algorithms import microbatches
from jaxrm.algorithms.reading import read_responses, response_statistics, token_statistics
from jaxrm.models import heads, lora
from jaxrm.models.generate import generate, refill_of
from jaxrm.models.heads import ScalarHead
from jaxrm.models.sampling import GenerateOptions, response_keys
from jaxrm.models.transformer import Decoder
from jaxrm.ops.vocab import TokenStatistics
from jaxrm.sharding.mesh import batch_shards
from jaxrm.types import ResponseBatch, TokenRewards


@dataclass(frozen=True)
class Networks:
    """Graphs of what PPO trains.

    Attributes:
      decoder: of a `jaxrm.models.transformer.Decoder`: the reference, and the policy unless the trunk is shared.
      policy: what the policy's parameters belong to: ``decoder``, or a `jaxrm.models.heads.ActorCritic`.
      critic: of a `jaxrm.models.heads.ScalarModel`; None where the trunk is shared, or there are no values.
      is_shared: whether policy and critic have one trunk.
      temperature: of sampling; it divides the logits of every log-prob.
      pad_to_multiple_of: see `jaxrm.algorithms.reading.response_hidden`.
    """

    decoder: nnx.GraphDef
    policy: nnx.GraphDef
    critic: nnx.GraphDef | None
    is_shared: bool = False
    temperature: float = 1.0
    pad_to_multiple_of: int = 1

    def open_policy(self, params: Any) -> tuple[Decoder, ScalarHead | None]:
        """The policy, and the value head where it is on the same trunk."""
        model = nnx.merge(self.policy, params)
        return (model.decoder, model.scalar_head) if self.is_shared else (model, None)

    def decoder_params(self, params: Any) -> Any:
        """The decoder's part of the policy's parameters."""
        return params["decoder"] if self.is_shared else params

    def frozen(self, base: Any) -> "FrozenParams":
        """What policy and critic do not train of themselves: the base of their adapters, as each has it in its tree."""
        if not base:
            return FrozenParams({}, {})
        critic = {} if self.critic is None else heads.frozen_trunk(base)
        return FrozenParams({"decoder": base} if self.is_shared else base, critic)

    def read_policy(self, params: Any, batch: ResponseBatch) -> tuple[TokenStatistics, jax.Array | None]:
        """What the policy says of each response token, and the values ``[B, T]`` where they are on its trunk."""
        decoder, value_head = self.open_policy(params)

        def read(hidden: jax.Array, tokens: jax.Array) -> tuple[TokenStatistics, jax.Array | None]:
            token = token_statistics(decoder, hidden, tokens, temperature=self.temperature)
            return token, None if value_head is None else value_head(hidden)

        return read_responses(decoder, batch, read, pad_to_multiple_of=self.pad_to_multiple_of)

    def read_reference(self, params: Any, batch: ResponseBatch) -> TokenStatistics:
        """What the reference says of each response token."""
        return response_statistics(
            self.decoder,
            params,
            batch,
            None,
            pad_to_multiple_of=self.pad_to_multiple_of,
            temperature=self.temperature,
        )

    def values(self, critic_params: Any, batch: ResponseBatch) -> jax.Array:
        """Values ``[B, T]`` of a critic with a trunk of its own: of the states before each response token."""
        assert self.critic is not None, "the values of a shared trunk come with the policy's log-probs"
        critic = nnx.merge(self.critic, critic_params)

        def read(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
            del tokens  # a value is of the state before
            values: jax.Array = critic.scalar_head(hidden)
            return values

        return read_responses(critic.decoder, batch, read, pad_to_multiple_of=self.pad_to_multiple_of)


class FrozenParams(NamedTuple):
    """Frozen parameters of policy and critic; ``{}`` where all are trained."""

    policy: Any
    critic: Any


class TokenLogProbs(NamedTuple):
    """Log-probs and values of the tokens of responses; ``[B, T]`` float32, 0 outside the mask.

    Attributes:
      log_probs: log-prob under the policy.
      entropy: of the policy, nats.
      reference_log_probs: log-prob under the reference.
      values: the critic's, of the state before each token; None where there are none.
      sampler_log_probs: those that the tokens were drawn with, see `Sampled`; None where nothing is made of them.
    """

    log_probs: jax.Array
    entropy: jax.Array
    reference_log_probs: jax.Array
    values: jax.Array | None
    sampler_log_probs: jax.Array | None = None


class RewardSource(Protocol):
    """Where token rewards come from: a reward model of either sort, a function of text, or a sum of several sources."""

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference's log-probs."""
        ...

    def __call__(self, calibration: Any, batch: ResponseBatch, reference_log_probs: jax.Array | None) -> TokenRewards:
        """Score responses.

        Args:
          calibration: a `jaxrm.ops.reward_scaling.Calibration`; of a sum one for each source, by name.
          batch: the responses.
          reference_log_probs: ``[B, T]``; may be None where none are needed.
        """
        ...


class Sampled(NamedTuple):
    """Responses as they were drawn.

    Attributes:
      responses: n rows for each prompt, next to each other.
      log_probs: ``[B, T]`` float32 of the tokens, as the sampler computed them; see `jaxrm.models.generate.Generation`.
    """

    responses: ResponseBatch
    log_probs: jax.Array


@dataclass(frozen=True)
class Reshard:
    """Jitted copies from one mesh to another of the same devices, and back.

    They are programs of their own, since a program with kernels on each device (`jax.shard_map`) knows one mesh alone.

    Attributes:
      params: ``params -> params``, to the other mesh, in the compute dtype.
      rows: ``(prompts [G, P], prompt_mask [G, P])`` to the other mesh.
      back: what was sampled, from there.
    """

    params: Callable[[Any], Any]
    rows: Callable[[tuple[jax.Array, jax.Array]], tuple[jax.Array, jax.Array]]
    back: Callable[[Sampled], Sampled]


@dataclass(frozen=True)
class BatchSampler:
    """Samples responses: ``sampler(params, prompts [G, P], prompt_mask [G, P], key) -> Sampled``.

    The key is that of all prompts, or keys ``[G]`` or ``[G, n]``, see `jaxrm.models.generate.generate`.

    Attributes:
      sample: jitted; the same function on the mesh that the policy samples on, from `build_sample`.
      reshard: to that mesh and back; None where everything lies on it. The copy of the parameters lives as long as a
        call.
      responses_per_prompt: n.
    """

    sample: Callable[[Any, jax.Array, jax.Array, jax.Array], Sampled]
    reshard: Reshard | None = None
    responses_per_prompt: int = 1

    def __call__(self, params: Any, prompts: jax.Array, prompt_mask: jax.Array, key: jax.Array) -> Sampled:
        """Sample the responses to each prompt."""
        key = response_keys(key, len(prompts), self.responses_per_prompt)
        if self.reshard is None:
            return self.sample(params, prompts, prompt_mask, key)
        rows = self.reshard.rows((prompts, prompt_mask))
        return self.reshard.back(self.sample(self.reshard.params(params), *rows, key))


def build_sample(
    graphdef: nnx.GraphDef,
    *,
    options: GenerateOptions,
    params_sharding: Any,
    batch_sharding: Any,
    num_microbatches: int = 1,
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], Sampled]:
    """Jitted ``sample(params, prompts [G, P], prompt_mask [G, P], keys [G, n]) -> Sampled``.

    Args:
      graphdef: of the decoder.
      options: how each part is answered. With n responses a prompt the batch has ``G n`` rows, those of a prompt next
        to each other. As many prompts are read at once for each device.
      params_sharding: of the decoder's parameters.
      batch_sharding: of the rows.
      num_microbatches: parts of the prompts, one after another.
    """
    n = options.responses_per_prompt
    if options.slots is not None:
        refill = refill_of(options.slots // n, batch_shards(batch_sharding.mesh))
        options = replace(options, refill=refill)

    def sample(params: Any, prompts: jax.Array, prompt_mask: jax.Array, keys: jax.Array) -> Sampled:
        def part(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            drawn = generate(graphdef, params, *rows, options=options)
            return tuple(x.reshape(-1, n, x.shape[1]) for x in (drawn.tokens, drawn.mask, drawn.log_probs))

        rows = (prompts, prompt_mask, keys)
        if num_microbatches == 1:
            by_prompt = part(rows)
        else:
            by_prompt = microbatches.merge(jax.lax.map(part, microbatches.split(rows, num_microbatches)))
        tokens, mask, log_probs = (x.reshape(-1, x.shape[2]) for x in by_prompt)
        prompts, prompt_mask = (jnp.repeat(x, n, axis=0) for x in (prompts, prompt_mask))
        return Sampled(ResponseBatch(prompts, prompt_mask, jnp.where(mask, tokens, 0), mask), log_probs)

    return jax.jit(
        sample, in_shardings=(params_sharding, batch_sharding, batch_sharding, None), out_shardings=batch_sharding
    )


def build_reshard(dtype: str, *, params_sharding: Any, batch_sharding: Any, to_params: Any, to_batch: Any) -> Reshard:
    """Copies to another mesh and back.

    Args:
      dtype: compute dtype, which the copied parameters are in, but for norms and biases: they are small.
      params_sharding: of the decoder's parameters as they are given.
      batch_sharding: of the rows as they are given, and given back.
      to_params: sharding of the copied parameters.
      to_batch: of the rows while the policy samples.
    """

    def cast(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(dtype) if path[-1].key in ("kernel", "embedding") else x, params
        )

    return Reshard(
        params=jax.jit(cast, in_shardings=(params_sharding,), out_shardings=to_params),
        rows=jax.jit(lambda rows: rows, in_shardings=(batch_sharding,), out_shardings=to_batch),
        back=jax.jit(lambda sampled: sampled, in_shardings=(to_batch,), out_shardings=batch_sharding),
    )


def build_log_probs(
    networks: Networks,
    *,
    policy_sharding: Any,
    critic_sharding: Any,
    reference_sharding: Any,
    batch_sharding: Any,
    base_sharding: Any = MappingProxyType({}),
    num_microbatches: int = 1,
) -> Callable[[Any, Any, Any, Any, ResponseBatch], TokenLogProbs]:
    """Jitted ``log_probs(base, policy_params, critic_params, reference_params, batch) -> TokenLogProbs``.

    Log-probs come from the forward that the update trains with, not from sampling, so that before the first update
    the ratio of new to old probabilities is 1. With adapters all three models are those of each on one base, which is
    an argument once; without, the base is ``{}``.

    Args:
      networks: graphs of the models.
      policy_sharding: of the policy's parameters.
      critic_sharding: of the critic's; their parameters are None where it has no trunk of its own.
      reference_sharding: of the reference's.
      batch_sharding: of the rows.
      base_sharding: of the base's parameters.
      num_microbatches: shares of the rows, one after another.
    """

    def log_probs(
        base: Any, policy_params: Any, critic_params: Any, reference_params: Any, batch: ResponseBatch
    ) -> TokenLogProbs:
        frozen = networks.frozen(base)
        policy_params, reference_params = lora.join(frozen.policy, policy_params), lora.join(base, reference_params)
        if critic_params is not None:
            critic_params = lora.join(frozen.critic, critic_params)

        def microbatch(batch: ResponseBatch) -> TokenLogProbs:
            policy, values = networks.read_policy(policy_params, batch)
            reference = networks.read_reference(reference_params, batch)
            if critic_params is not None:
                values = networks.values(critic_params, batch)
            every = TokenLogProbs(policy.log_probs, policy.entropy, reference.log_probs, values)
            return jax.tree.map(lambda x: jnp.where(batch.response_mask, x, 0.0), every)

        return microbatches.in_microbatches(microbatch, num_microbatches)(batch)

    return jax.jit(
        log_probs,
        in_shardings=(dict(base_sharding), policy_sharding, critic_sharding, reference_sharding, batch_sharding),
        out_shardings=batch_sharding,
    )


def build_reference_log_probs(
    networks: Networks,
    *,
    reference_sharding: Any,
    batch_sharding: Any,
    base_sharding: Any = MappingProxyType({}),
    num_microbatches: int = 1,
) -> Callable[[Any, Any, ResponseBatch], jax.Array]:
    """Jitted ``log_probs(base, reference_params, batch) -> [B, T]``: the reference's part of `build_log_probs` alone.

    Arguments are those of `build_log_probs`.
    """

    def log_probs(base: Any, reference_params: Any, batch: ResponseBatch) -> jax.Array:
        params = lora.join(base, reference_params)

        def microbatch(batch: ResponseBatch) -> jax.Array:
            return jnp.where(batch.response_mask, networks.read_reference(params, batch).log_probs, 0.0)

        return microbatches.in_microbatches(microbatch, num_microbatches)(batch)

    return jax.jit(
        log_probs,
        in_shardings=(dict(base_sharding), reference_sharding, batch_sharding),
        out_shardings=batch_sharding,
    )
