"""Responses of many lengths as batches of few shapes."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm.errors import UserError
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards
from jaxrm.types import ResponseBatch

_SMALLEST = 32  # tokens


def response_batches(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    rows: int,
    mesh: Mesh,
    *,
    vocab_size: int | None = None,
) -> Iterator[tuple[ResponseBatch, list[int]]]:
    """Put responses of about the same length together, padded to few widths, so that few shapes are compiled.

    Args:
      prompts: token ids of each prompt.
      responses: token ids of the response to each.
      rows: responses in a batch; rounded up to what the devices share evenly. Rows left over are empty.
      mesh: the devices that rows lie on.
      vocab_size: V of the model that will read them, which has embeddings for ids from 0 to V - 1.

    Returns:
      Iterator over batches on the devices, each with the indices of its responses, which are its first rows.

    Raises:
      UserError: a prompt or response has no token, or one that the model has not, or there are not as many prompts as
        responses. At once, before any batch is made.
    """
    if len(prompts) != len(responses):
        raise UserError(f"there are {len(prompts)} prompts and {len(responses)} responses; give each response its own")
    for name, texts in (("prompts", prompts), ("responses", responses)):
        for i, ids in enumerate(texts):
            _check(f"{name}[{i}]", np.asarray(ids), vocab_size)
    return _batches(prompts, responses, rows, mesh)


def _check(name: str, ids: np.ndarray, vocab_size: int | None) -> None:
    if not ids.size:
        raise UserError(f"{name} has no token; it must have at least 1, if only the one that ends a turn")
    outside = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if outside.any():
        last = "" if vocab_size is None else f" to {vocab_size - 1}"
        raise UserError(
            f"{name} has token id {ids[outside][0]}, but ids of the model go from 0{last}; write it with the tokenizer "
            "that belongs to the model"
        )


def _batches(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], rows: int, mesh: Mesh
) -> Iterator[tuple[ResponseBatch, list[int]]]:
    shards = batch_shards(mesh)
    rows = -(-rows // shards) * shards
    sharding = partition.batch_sharding(mesh)
    order = sorted(range(len(prompts)), key=lambda i: (bucket(len(responses[i])), len(prompts[i]), i))
    for start in range(0, len(order), rows):
        indices = order[start : start + rows]
        P = bucket(max(len(prompts[i]) for i in indices))
        T = bucket(max(len(responses[i]) for i in indices))
        prompt_ids, prompt_mask = np.zeros((rows, P), np.int32), np.zeros((rows, P), bool)
        ids, mask = np.zeros((rows, T), np.int32), np.zeros((rows, T), bool)
        for row, i in enumerate(indices):
            prompt, response = prompts[i], responses[i]
            prompt_ids[row, P - len(prompt) :], prompt_mask[row, P - len(prompt) :] = prompt, True
            ids[row, : len(response)], mask[row, : len(response)] = response, True
        arrays = (prompt_ids, prompt_mask, ids, mask)
        # Every process has all of it and gives its devices their part.
        placed = [jax.make_array_from_callback(array.shape, sharding, array.__getitem__) for array in arrays]
        yield ResponseBatch(*placed), indices


def bucket(length: int) -> int:
    """Least power of two, or one and a half of it, that holds ``length``."""
    power = max(_SMALLEST, 1 << max(length - 1, 0).bit_length())
    return power * 3 // 4 if power > _SMALLEST and length <= power * 3 // 4 else power
