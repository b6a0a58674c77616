"""One decoder for the Llama, Mistral, Qwen and Gemma families.

Single-device code: parameters carry the names of their logical axes, and ``jaxrm.sharding.partition`` alone maps
those to devices. Layers are stacked on a leading axis and scanned, so a model of any depth compiles once; decoding
alone unrolls them, since a scan would copy the cache of every layer at every token.
"""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.models import blockwise, cache, cached_attention, layers, quantized, rope
from jaxrm.models.config import ModelConfig
from jaxrm.models.kernels import PLAIN, Kernels
from jaxrm.ops import vocab_chunks

# Names of what the backward pass keeps of a layer, by how it is given in a config; the rest is computed again.
KEPT_NAMES: dict[str, tuple[str, ...]] = {
    "full": blockwise.SAVED_BY_REMAT,
    "attention": (*blockwise.SAVED_BY_REMAT, layers.PROJECTED["attention"]),
    "dots": (*blockwise.SAVED_BY_REMAT, *layers.PROJECTED.values()),
}
REMAT_POLICIES = (*KEPT_NAMES, "none")
_HIDDEN = ("batch", "sequence", None)
_KEYS = ("batch", "kv_heads", "head_dim", None)
_VALUES = ("batch", "kv_heads", None, "head_dim")

CacheType = TypeVar("CacheType", cache.Cache, cache.SharedPrompts)


@dataclasses.dataclass(frozen=True)
class DecodingStorage:
    """How a loop over tokens stores what it reads at every token.

    Attributes:
      weights: ``compute``, in the compute dtype; or ``int8``, a byte a weight and a scale for each output.
      cache: the same of keys and values, with a scale for each token and head.
    """

    weights: str = "compute"
    cache: str = "compute"


COMPUTE_STORAGE = DecodingStorage()


class Decoder(nnx.Module):
    """Causal language model from token ids to hidden states.

    Args:
      config: shape and choices of the model.
      rngs: source of the initial parameters, float32.
      dtype: compute dtype; norms, softmax and rotations are in float32 whatever it is.
      remat: what the backward pass keeps of a layer: ``full`` the output of attention alone, and nothing with cuDNN,
        whose kernel does not name it (least memory); ``attention`` its projections too; ``dots`` the results of all
        matrix products with weights; ``none`` everything.
      kernels: those of the platform.
      constrain: pins activations to devices where a mesh is used.
      projections: their adapters, and how their kernels are stored; in ``dtype`` whatever theirs is.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype | type = jnp.float32,
        remat: str = "full",
        kernels: Kernels = PLAIN,
        constrain: layers.Constrain = layers.unconstrained,
        projections: layers.ProjectionOptions = layers.PLAIN,
    ):
        assert remat in REMAT_POLICIES, remat
        dtype = jnp.dtype(dtype)
        self.config, self.dtype, self.remat = config, dtype, remat
        self.kernels, self.constrain = kernels, constrain
        self.storage = COMPUTE_STORAGE  # see ``jaxrm.models.build.with_storage``
        self.scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        self.embedder = layers.Embedding(rngs, config)
        options = dataclasses.replace(projections, dtype=dtype)
        self.layers = layers.Layer(rngs, config, (config.num_layers,), options)
        self.final_norm = layers.RMSNorm(config, (), config.hidden_size)
        self.head = None if config.tie_embeddings else layers.Embedding(rngs, config)

    def __call__(self, tokens: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Hidden states ``[B, T, D]`` after the final norm, in the compute dtype.

        Args:
          tokens: ``[B, T]`` int token ids.
          positions: ``[B, T]`` int, counted inside each segment.
          segment_ids: ``[B, T]`` int, 0 for padding; a token sees only its own segment.
        """
        return self._forward(tokens, positions, segment_ids, return_kv=False)[0]

    def prefill(
        self, tokens: jax.Array, *, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, cache.SharedPrompts]:
        """Hidden states ``[G, P, D]`` of prompts, and their keys and values.

        Arguments as for a call, with one segment a row and any padding on the left.
        """
        hidden, kv = self._forward(tokens, positions, segment_ids, return_kv=True)
        assert kv is not None
        return hidden, self.as_prompts(kv, segment_ids, positions)

    def as_prompts(
        self, kv: tuple[jax.Array, jax.Array], segment_ids: jax.Array, positions: jax.Array
    ) -> cache.SharedPrompts:
        """Keys and values ``[L, G, P, K, H]`` of prompts as decoding reads them; the rest as in ``prefill``."""
        prompts = cache.from_prompts(*kv, segment_ids, positions)
        return self.constrain_cache(cache.in_int8(prompts) if self.storage.cache == "int8" else prompts)

    def empty_cache(self, prompts: cache.SharedPrompts, n: int, size: int) -> cache.Cache:
        """Room for ``size`` tokens of each of the ``n`` rows that begin with each prompt; for ``decode``."""
        return self.constrain_cache(cache.empty(prompts, n, size))

    def unstack_layers(self) -> tuple[layers.Layer, ...]:
        """The layers one by one, for ``decode``; outside the decoding loop, which then reads each in place.

        Their weights are as the loop reads them at every token: transposed, and in the compute dtype or as int8 codes
        (``DecodingStorage``). Those of a quantized base are dequantized first (jaxrm choice), and adapters added.
        """
        graphdef, stacked = nnx.split(self.layers)

        def one_layer(i: int) -> layers.Layer:
            layer = nnx.merge(graphdef, jax.tree.map(lambda p: p[i], stacked))
            for _, part in nnx.iter_modules(layer):
                if isinstance(part, layers.Projection):
                    part.transpose(self.storage.weights)
            layer.mlp.join()
            return layer

        return tuple(one_layer(i) for i in range(self.config.num_layers))

    def decode_head(self) -> jax.Array | quantized.Int8Array:
        """Output embedding ``[V, D]`` for the ``logits`` of a decoding loop; as ``unstack_layers``."""
        if self.storage.weights == "int8":
            return quantized.to_int8(self.head_embedding, axis=1)
        return self.head_embedding.astype(self.dtype)

    def decode(
        self,
        tokens: jax.Array,
        unstacked: tuple[layers.Layer, ...],
        past: cache.Cache,
        prompts: cache.SharedPrompts,
    ) -> tuple[jax.Array, cache.Cache]:
        """Hidden states ``[B, 1, D]`` of the next token of each row, and the cache with it written in.

        Args:
          tokens: ``[B, 1]`` int token ids.
          unstacked: from ``unstack_layers``.
          past: the tokens between the prompt and it.
          prompts: what the rows begin with.
        """
        config = self.config
        positions = past.next_position[:, None]
        full, sliding = self.rotations(positions)
        window, width, P = config.sliding_window or 0, past.width, prompts.occupied.shape[1]
        age = (past.cursor - jnp.arange(width)) % width
        seen = age[None] <= past.lengths[:, None]
        n = past.lengths.shape[0] // prompts.occupied.shape[0]
        is_read = prompts.occupied & jnp.any((past.lengths >= 0).reshape(-1, n), axis=1, keepdims=True)
        near = seen & (age < window)[None]
        # Rows of one prompt may have lengths of their own, so a window's edge in the prompt is that of each row.
        distance = past.lengths[:, None] + jnp.arange(P, 0, -1)[None]
        near_prompt = jnp.repeat(is_read, n, axis=0) & (distance < window)

        def cached_prompts(i: int, is_sliding: bool) -> cached_attention.CachedKeys:
            mask = near_prompt if is_sliding else is_read
            return cached_attention.CachedKeys(prompts.keys[i], prompts.values[i], mask)

        attend = functools.partial(
            cached_attention.attend,
            scale=self.scale,
            softcap=config.attention_softcap,
            read=self.kernels.read_cache,
        )
        x = self.embed(tokens)
        keys, values = list(past.keys), list(past.values)
        for i, layer in enumerate(unstacked):
            is_sliding = bool(config.layer_is_sliding) and config.layer_is_sliding[i]
            query, key, value = layer.attention.qkv(layer.attention_norm(x), sliding if is_sliding else full)
            keys[i] = self._constrained(cache.written(keys[i], key[:, 0], past.cursor, column=3, head_dim=2), _KEYS)
            values[i] = cache.written(values[i], value[:, 0], past.cursor, column=2, head_dim=3)
            values[i] = self._constrained(values[i], _VALUES)
            own = cached_attention.CachedKeys(keys[i], values[i], near if is_sliding else seen)
            attended = attend(query[:, 0], own, cached_prompts(i, is_sliding))
            x = self.constrain(layer.output_and_mlp(x, attended[:, None]), _HIDDEN)
        cursor = (past.cursor + 1) % width
        grown = cache.Cache(tuple(keys), tuple(values), cursor, past.lengths + 1, past.next_position + 1)
        return self.final_norm(x), grown

    def constrain_cache(self, past: CacheType) -> CacheType:
        """Rows and heads of keys and values on their devices."""
        keys, values = self._constrained(past.keys, _KEYS), self._constrained(past.values, _VALUES)
        return dataclasses.replace(past, keys=keys, values=values)

    def _constrained(self, cached: Any, axes: tuple[str | None, ...]) -> Any:
        return jax.tree.map(lambda x: self.constrain(x, axes), cached)

    @property
    def head_embedding(self) -> jax.Array:
        """Output embedding ``[V, D]`` as the parameters hold it: what ``jaxrm.ops.vocab`` takes as its head."""
        return (self.head or self.embedder).embedding[...]

    def logits(self, hidden: jax.Array, head: jax.Array | quantized.Int8Array | None = None) -> jax.Array:
        """Logits ``[..., V]`` in float32, soft-capped; for single positions (decoding) and small tests only.

        Those of ids that cannot be drawn are -inf.

        Args:
          hidden: ``[..., D]``.
          head: from ``decode_head``, in a loop.
        """
        if isinstance(head, quantized.Int8Array):
            logits = quantized.int8_product(hidden, head)
        else:
            head = (self.head_embedding if head is None else head).astype(hidden.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        if not self.config.drawable:
            return logits
        can_be_drawn = vocab_chunks.is_drawable(jnp.arange(logits.shape[-1], dtype=jnp.int32), self.config.drawable)
        return jnp.where(jnp.expand_dims(can_be_drawn, range(logits.ndim - 1)), logits, -jnp.inf)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings ``[B, T, D]`` of tokens, as the first layer reads them."""
        # The table's columns are split over fsdp, as the rows of the batch are. So each device looks up its columns for
        # the rows of all of them, and two all-to-alls return tokens and rows to their own devices. Without the
        # constraints in between the compiler copies every row to every device.
        x = self.embedder.embedding[...][self.constrain(tokens, ("batch_by_data", None))]
        x = self.constrain(x, ("batch_by_data", None, "embed")).astype(self.dtype)
        x = self.constrain(x, ("batch_by_data", "sequence", "embed_by_fsdp"))
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.hidden_size**0.5, self.dtype)
        return self.constrain(x, _HIDDEN)

    def rotations(self, positions: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """Rotations of the full-attention layers and of the sliding ones (the same unless the model says)."""
        config = self.config
        full = rope.rotations(positions, rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
        if config.local_rope_theta is None:
            return full, full
        local = rope.frequencies(config.head_dim, config.local_rope_theta, None)
        return full, rope.rotations(positions, local)

    def _forward(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, *, return_kv: bool
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Scan the layers over whole rows; with ``return_kv``, also the keys and values ``[L, B, T, K, H]``."""
        config = self.config
        graphdef, stacked = nnx.split(self.layers)
        full, sliding = self.rotations(positions)
        attend = functools.partial(self.kernels.attend, scale=self.scale, softcap=config.attention_softcap)
        attend_full = functools.partial(attend, window=None)
        attend_near = functools.partial(attend, window=config.sliding_window)
        flags = config.layer_is_sliding or (False,) * config.num_layers

        def one_layer(x: jax.Array, inputs: Any) -> Any:
            state, is_sliding = inputs
            layer = nnx.merge(graphdef, state)
            normed = layer.attention_norm(x)
            if all(flags) or not any(flags):
                qkv = layer.attention.qkv(normed, sliding if flags[0] else full)
                attended = (attend_near if flags[0] else attend_full)(*qkv, segment_ids)
            else:
                rotation = jax.tree.map(lambda near, far: jnp.where(is_sliding, near, far), sliding, full)
                qkv = layer.attention.qkv(normed, rotation)
                attended = jax.lax.cond(is_sliding, attend_near, attend_full, *qkv, segment_ids)
            x = self.constrain(layer.output_and_mlp(x, attended), _HIDDEN)
            return x, qkv[1:] if return_kv else None

        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*KEPT_NAMES[self.remat])
            one_layer = jax.checkpoint(one_layer, policy=policy, prevent_cse=False)
        x, kv = jax.lax.scan(one_layer, self.embed(tokens), (stacked, jnp.asarray(flags)))
        return self.final_norm(x), kv


def positions_from_mask(mask: jax.Array) -> jax.Array:
    """Positions ``[B, T]`` of rows with padding on either side: the count of real tokens before, from 0.

    Args:
      mask: ``[B, T]`` bool, False on padding.
    """
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
