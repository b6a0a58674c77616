"""What a decoder or a scalar model says of each token of a response, by one forward."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.models.transformer import Decoder
from jaxrm.ops import vocab
from jaxrm.types import ResponseBatch, RowPacking

Result = TypeVar("Result")


def read_responses(
    model: Decoder,
    batch: ResponseBatch,
    read: Callable[[jax.Array, jax.Array], Result],
    *,
    pad_to_multiple_of: int = 1,
) -> Result:
    """What is read from the states that response tokens are predicted from, by one forward over ``x, y``.

    Args:
      model: the decoder.
      batch: prompts x and responses y; its packing says which share a row.
      read: from hidden states ``[..., D]`` and the tokens ``[...]`` that they predict to a tree of ``[...]``, token by
        token. The tokens are those of the responses, ``[B, T]``, or only the real ones, side by side.
      pad_to_multiple_of: see `response_hidden`.

    Returns:
      What ``read`` gives, ``[B, T]``. Outside the response mask it means nothing.
    """
    if batch.packing is None:
        return read(response_hidden(model, batch, pad_to_multiple_of=pad_to_multiple_of), batch.responses)
    tokens, positions, segment_ids = _packed_rows(batch, batch.packing, pad_to_multiple_of)
    hidden = model(tokens, positions=positions, segment_ids=segment_ids)
    predicting, targets, places = _packed_responses(batch, batch.packing)
    # Each share of the rows is of one device, so no hidden state leaves its own.
    hidden = hidden.reshape(batch.packing.num_shares, -1, hidden.shape[-1])
    hidden = jnp.take_along_axis(hidden, predicting[:, :, None], axis=1)
    results = read(model.constrain(hidden, ("batch", "sequence", None)), targets)
    return jax.tree.map(lambda x: jnp.take_along_axis(x, places, axis=1).reshape(batch.responses.shape), results)


def response_hidden(
    model: Decoder, batch: ResponseBatch, request: tuple[int, ...] | None = None, *, pad_to_multiple_of: int = 1
) -> jax.Array:
    """Hidden states that each response token is predicted from, by one forward with a row for each response.

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
    model: Decoder, hidden: jax.Array, tokens: jax.Array, *, temperature: float = 1.0
) -> vocab.TokenStatistics:
    """What a decoder says of each response token ``[...]``, given the states ``[..., D]`` that predict it.

    ``temperature`` divides the logits, as it does in sampling, and ids without a token have no share, since they are
    never drawn. Only states before response tokens meet the vocabulary.
    """
    return vocab.token_statistics(
        hidden,
        model.head_embedding,
        tokens,
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

    Arguments as for `response_hidden` and `token_statistics`. A packing counts where there is no request.

    Returns:
      Statistics ``[B, T]``, float32: those of ``q(. | template(x, y), y_<t)``, or of ``pi(. | x, y_<t)``. Outside the
      response mask they mean nothing.
    """
    model = nnx.merge(graphdef, params)
    read = functools.partial(token_statistics, model, temperature=temperature)
    if request is None:
        return read_responses(model, batch, read, pad_to_multiple_of=pad_to_multiple_of)
    return read(response_hidden(model, batch, request, pad_to_multiple_of=pad_to_multiple_of), batch.responses)


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


def _packed_rows(batch: ResponseBatch, packing: RowPacking, multiple: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows ``x, y, x, y, ...``: tokens, positions and segment ids ``[S R, W]`` with R rows a share."""
    S, P = packing.num_shares, batch.prompts.shape[1]
    width = row_width(batch, multiple)
    starts, prompt_lengths, response_lengths = _by_share(batch, packing)
    order = jnp.argsort(starts, axis=1)
    slots = jnp.arange(packing.num_rows * width, dtype=jnp.int32)
    last_start = jax.vmap(lambda sorted_starts: jnp.searchsorted(sorted_starts, slots, side="right"))
    owners = _take(order, last_start(_take(starts, order)) - 1)  # the last that starts at a slot or before it
    at = slots[None, :] - _take(starts, owners)
    prompt_length = _take(prompt_lengths, owners)
    # Prompts are padded on the left.
    from_prompt = _take_tokens(batch.prompts, owners, at + P - prompt_length)
    tokens = jnp.where(at < prompt_length, from_prompt, _take_tokens(batch.responses, owners, at - prompt_length))
    mask = at < prompt_length + _take(response_lengths, owners)
    rows = (jnp.where(mask, x, 0) for x in (tokens, at, owners + 1))
    tokens, positions, segment_ids = (x.astype(jnp.int32).reshape(S * packing.num_rows, width) for x in rows)
    return tokens, positions, segment_ids


def _packed_responses(batch: ResponseBatch, packing: RowPacking) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The response tokens of each share side by side.

    Returns:
      ``[S, N]``, in the packed rows of a share, put end to end, the token before each; ``[S, N]`` the tokens; and where
      each token of the batch is among them, ``[S, B / S T]``.
    """
    T, N = batch.responses.shape[1], packing.num_tokens
    starts, prompt_lengths, response_lengths = _by_share(batch, packing)
    ends = jnp.cumsum(response_lengths, axis=1)
    firsts, slots = ends - response_lengths, jnp.arange(N, dtype=jnp.int32)
    owners = jax.vmap(lambda one: jnp.searchsorted(one, slots, side="right"))(ends)
    owners = jnp.minimum(owners, starts.shape[1] - 1)
    # Places after the last token read it again, since what lies outside of the rows would be no number.
    at = jnp.minimum(slots[None, :] - _take(firsts, owners), jnp.maximum(_take(response_lengths, owners) - 1, 0))
    predicting = _take(starts + prompt_lengths - 1, owners) + at
    places = firsts[:, :, None] + jnp.arange(T, dtype=jnp.int32)[None, None, :]
    return predicting, _take_tokens(batch.responses, owners, at), jnp.minimum(places, N - 1).reshape(len(starts), -1)


def _by_share(batch: ResponseBatch, packing: RowPacking) -> tuple[jax.Array, ...]:
    """Starts of prompts, lengths of prompts, and of responses; ``[S, B / S]``."""
    prompt_lengths, response_lengths = lengths_of(batch)
    return tuple(x.reshape(packing.num_shares, -1) for x in (packing.starts, prompt_lengths, response_lengths))


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, at, axis=1)


def _take_tokens(tokens: jax.Array, owners: jax.Array, at: jax.Array) -> jax.Array:
    """Of ``tokens [B, T]`` that of row ``owners [S, n]`` of each share, at ``at [S, n]``."""
    width = tokens.shape[1]
    return _take(tokens.reshape(len(owners), -1), owners * width + jnp.clip(at, 0, width - 1))


def lengths_of(batch: ResponseBatch) -> tuple[jax.Array, jax.Array]:
    """Tokens of each prompt and of each response, ``[B]`` int32."""
    prompts, responses = (jnp.sum(mask, axis=1, dtype=jnp.int32) for mask in (batch.prompt_mask, batch.response_mask))
    return prompts, responses


def row_width(batch: ResponseBatch, multiple: int) -> int:
    """Tokens of a row that any prompt fits into with its response: a multiple of ``multiple``."""
    return -(-(batch.prompts.shape[1] + batch.responses.shape[1]) // multiple) * multiple


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
