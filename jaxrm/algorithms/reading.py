"""What a decoder or a scalar model says of each token of a response, by one forward."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.models.transformer import Decoder
from jaxrm.ops import vocab
from jaxrm.types import ResponseBatch


def response_hidden(
    model: Decoder, batch: ResponseBatch, request: tuple[int, ...] | None = None, *, pad_to_multiple_of: int = 1
) -> jax.Array:
    """Hidden states that each response token is predicted from, by one forward.

    Args:
      model: the decoder.
      batch: prompts x and responses y.
      request: ids that ask for the correction (`jaxrm.data.pairs.correction_request`): the decoder is a seq2seq reward
        model, which reads ``x, y, request`` and then y again, token by token. None: it reads ``x, y``.
      pad_to_multiple_of: rows are filled up to a multiple of so many tokens, for kernels with blocks.

    Returns:
      ``[B, T, D]``; at ``t`` the state of the token before ``y_t``, of which the first is the last one of the prompt
      or of the request. Outside the response mask it means nothing.
    """
    tokens, mask, start = _rows(batch, request, pad_to_multiple_of)
    hidden = model(tokens, positions=_positions(tokens), segment_ids=mask.astype(jnp.int32))
    steps = jnp.arange(batch.responses.shape[1], dtype=jnp.int32)[None, :]
    predicting = jnp.maximum(start[:, None] - 1 + steps, 0)
    return model.constrain(jnp.take_along_axis(hidden, predicting[:, :, None], axis=1), ("batch", "sequence", None))


def token_statistics(
    model: Decoder, hidden: jax.Array, batch: ResponseBatch, *, temperature: float = 1.0
) -> vocab.TokenStatistics:
    """What a decoder says of each response token, given ``hidden [B, T, D]`` from `response_hidden`.

    ``temperature`` divides the logits, as it does in sampling, and ids without a token have no share, since they are
    never drawn. Only states before response tokens meet the vocabulary.
    """
    return vocab.token_statistics(
        hidden,
        model.head_embedding,
        batch.responses,
        softcap=model.config.logit_softcap,
        temperature=temperature,
        drawable=model.config.drawable,
        forward=model.kernels.vocabulary,
    )


def response_statistics(
    graphdef: nnx.GraphDef,
    params: Any,
    batch: ResponseBatch,
    request: tuple[int, ...] | None,
    *,
    pad_to_multiple_of: int = 1,
    temperature: float = 1.0,
) -> vocab.TokenStatistics:
    """What a decoder says of each response token, by one forward.

    Arguments as for `response_hidden` and `token_statistics`.

    Returns:
      Statistics ``[B, T]``, float32: those of ``q(. | template(x, y), y_<t)``, or of ``pi(. | x, y_<t)``. Outside the
      response mask they mean nothing.
    """
    model = nnx.merge(graphdef, params)
    hidden = response_hidden(model, batch, request, pad_to_multiple_of=pad_to_multiple_of)
    return token_statistics(model, hidden, batch, temperature=temperature)


def prefix_scores(
    graphdef: nnx.GraphDef, params: Any, batch: ResponseBatch, *, pad_to_multiple_of: int = 1
) -> jax.Array:
    """Rewards that a scalar reward model gives to the first 0, 1, ... T tokens of each response, by one forward.

    Returns:
      ``[B, T + 1]`` float32, read from the last token of the prompt and from each token of the response. Beyond the
      end of a response they mean nothing.
    """
    model = nnx.merge(graphdef, params)
    tokens, mask, start = _rows(batch, None, pad_to_multiple_of)
    rewards = model(tokens, positions=_positions(tokens), segment_ids=mask.astype(jnp.int32))
    steps = jnp.arange(batch.responses.shape[1] + 1, dtype=jnp.int32)[None, :]
    return jnp.take_along_axis(rewards, jnp.maximum(start[:, None] - 1 + steps, 0), axis=1)


def response_scores(
    graphdef: nnx.GraphDef, params: Any, batch: ResponseBatch, *, pad_to_multiple_of: int = 1
) -> jax.Array:
    """Reward ``[B]`` of a scalar reward model, float32, read from the last token of each response."""
    return _of_whole(prefix_scores(graphdef, params, batch, pad_to_multiple_of=pad_to_multiple_of), batch)


def _of_whole(scores: jax.Array, batch: ResponseBatch) -> jax.Array:
    """Score ``[B]`` of each whole response, from the scores ``[B, T + 1]`` of its prefixes."""
    length = jnp.sum(batch.response_mask, axis=1, dtype=jnp.int32)
    return jnp.take_along_axis(scores, length[:, None], axis=1)[:, 0]


def _rows(
    batch: ResponseBatch, request: tuple[int, ...] | None, multiple: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows ``x, y`` or ``x, y, request, y``: tokens and mask ``[B, W]``, and where the last part starts ``[B]``."""
    # Without gaps: a sliding window counts the tokens of a row, padding included, so a gap would push tokens out of it.
    # Tokens are gathered by index, since rows of a jitted program have one width and each part its own length.
    P, T = batch.prompts.shape[1], batch.responses.shape[1]
    prompt_length = jnp.sum(batch.prompt_mask, axis=1, dtype=jnp.int32)[:, None]
    response_length = jnp.sum(batch.response_mask, axis=1, dtype=jnp.int32)[:, None]
    request_ids = jnp.asarray(request or (), jnp.int32)
    R = len(request or ())
    width = P + T if request is None else P + T + R + T
    index = jnp.arange(-(-width // multiple) * multiple, dtype=jnp.int32)[None, :]

    def gather(source: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(source, jnp.clip(at, 0, source.shape[1] - 1), axis=1)

    start = prompt_length
    # Prompts are padded on the left: their first token is in column P - prompt_length.
    tokens = jnp.where(
        index < prompt_length, gather(batch.prompts, index + P - prompt_length), gather(batch.responses, index - start)
    )
    if request is not None:
        request_start = prompt_length + response_length
        start = request_start + R
        tail = gather(batch.responses, index - start)
        if R:
            tail = jnp.where(index < start, request_ids[jnp.clip(index - request_start, 0, R - 1)], tail)
        tokens = jnp.where(index < request_start, tokens, tail)
    mask = index < start + response_length
    return jnp.where(mask, tokens, 0), mask, start[:, 0]


def _sources(batch: ResponseBatch, request: tuple[int, ...], multiple: int) -> tuple[jax.Array, jax.Array]:
    """Rows ``x, y, request`` padded on the left, as they are read before a correction: tokens and mask ``[B, W]``."""
    tokens, _, start = _rows(batch, request, 1)
    width = batch.prompts.shape[1] + batch.responses.shape[1] + len(request)
    width = -(-width // multiple) * multiple
    index = jnp.arange(width, dtype=jnp.int32)[None, :] - (width - start[:, None])
    mask = index >= 0
    return jnp.where(mask, jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1), 0), mask


def _positions(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
