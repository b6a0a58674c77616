"""A seq2seq reward model's own corrections of responses, token by token, inside the jitted step that scores them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.models.generate import generate
from jaxrm.models.sampling import GenerateOptions, SamplingConfig
from jaxrm.ops import edit_alignment
from jaxrm.types import ResponseBatch


def kept_by_correction(
    graphdef: nnx.GraphDef,
    params: Any,
    batch: ResponseBatch,
    sources: tuple[jax.Array, jax.Array],
    *,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
) -> jax.Array:
    """Which tokens of each response the reward model's greedy correction of it keeps.

    Args:
      graphdef: of the decoder.
      params: its parameters.
      batch: prompts and responses.
      sources: rows ``x, y, request`` ``[B, W]`` padded on the left, and their mask.
      max_new_tokens: longest correction. It also ends where the model has no more positions.
      end_ids: ids that end a correction.

    Returns:
      ``[B, T]`` bool, by `jaxrm.ops.edit_alignment.kept_tokens`.
    """
    tokens, mask = sources
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)
    written = generate(graphdef, params, tokens, mask, jax.random.key(0), options=GenerateOptions(sampling, end_ids))
    max_position = nnx.merge(graphdef, params).config.max_position
    position = jnp.sum(mask, axis=1, dtype=jnp.int32)[:, None] + jnp.arange(max_new_tokens, dtype=jnp.int32)[None]
    is_written = written.mask & (position < max_position)
    return edit_alignment.kept_tokens(batch.responses, batch.response_mask, written.tokens, is_written)
