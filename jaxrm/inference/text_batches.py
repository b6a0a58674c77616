"""Whole dialogues as rows of token ids, and the program that scores each at its last token."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.inference import sharded_model
from jaxrm.inference.response_batches import bucket
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards


def build_text_step(model: ShardedModel) -> Any:
    """Jitted ``(params, tokens [B, W], last [B]) -> [B]``, the score at the token ``last`` of each row."""
    mesh, graphdef = model.mesh, model.graphdef
    rows, copied = partition.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def step(params: Any, tokens: jax.Array, last: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        segments = (positions <= last[:, None]).astype(jnp.int32)
        scores = nnx.merge(graphdef, params)(tokens, positions=positions, segment_ids=segments)
        return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]

    return jax.jit(step, in_shardings=(model.shardings, rows, rows), out_shardings=copied)


def text_batches(
    texts: Sequence[np.ndarray], rows: int, mesh: Mesh
) -> Iterator[tuple[jax.Array, jax.Array, list[int]]]:
    """Rows of about one length, padded to few widths: tokens, the index of each row's last one, and whose they are.

    Every process has all of it and gives its devices their part. Rows left over are one token of padding.
    """
    shards, multiple = batch_shards(mesh), sharded_model.pad_to_multiple_of(mesh)
    height = -(-rows // shards) * shards
    sharding = partition.batch_sharding(mesh)
    order = sorted(range(len(texts)), key=lambda i: (bucket(len(texts[i])), i))
    for start in range(0, len(order), height):
        indices = order[start : start + height]
        width = -(-bucket(max(len(texts[i]) for i in indices)) // multiple) * multiple
        tokens, last = np.zeros((height, width), np.int32), np.zeros(height, np.int32)
        for row, i in enumerate(indices):
            tokens[row, : len(texts[i])], last[row] = texts[i], len(texts[i]) - 1
        placed = [jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in (tokens, last)]
        yield placed[0], placed[1], indices
