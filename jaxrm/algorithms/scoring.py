"""Reward model, prompts and responses to token rewards, by one forward pass.

A seq2seq reward model needs no decoding for it: up to the first token where its greedy output differs from the
response, greedy and forced context are the same, and from there on the response is fed to it anyway (arXiv 2409.00162,
Figure 2). So one pass over ``template(x, y), y`` gives the greedy token at every place, and with it every tag.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.algorithms import microbatches
from jaxrm.algorithms.corrections import kept_by_correction
from jaxrm.models.transformer import Decoder
from jaxrm.ops import masking, reward_scaling, token_rewards, vocab
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.ops.token_rewards import Kind, Reads, Source
from jaxrm.types import ResponseBatch, TokenRewards


class Scorer(Protocol):
    """Token rewards of responses. Every kind and both sorts of reward model have this signature."""

    def __call__(
        self,
        params: Any,
        calibration: Calibration,
        batch: ResponseBatch,
        reference_log_probs: jax.Array | None = None,
    ) -> TokenRewards:
        """Score a batch; ``reference_log_probs [B, T]`` only where the kind needs them."""
        ...


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


def build_scorer(
    kind: Kind,
    graphdef: nnx.GraphDef,
    *,
    request: tuple[int, ...],
    end_ids: tuple[int, ...],
    pad_to_multiple_of: int = 1,
    temperature: float = 1.0,
    correction_length: int | None = None,
) -> Scorer:
    """Scorer of a reward model: one forward pass, the kind's values, scale and center.

    The kind ``edit_aligned`` has the model write its correction of each response, and compares the two.

    Args:
      kind: of token reward; it says which sort of reward model ``graphdef`` must be.
      graphdef: of the decoder of a seq2seq reward model, or of a scalar model.
      request: see `response_statistics`; a scalar reward model does not read it.
      end_ids: tokens that end a response.
      pad_to_multiple_of: see `response_hidden`.
      temperature: of sampling, at which a policy of DPO is read, as its reference is; no reward model is.
      correction_length: most tokens of a correction, where the kind has one written; None for as many as the batch's
        responses may have.
    """
    read = _build_read(kind.needs, graphdef, request, pad_to_multiple_of, temperature)
    if kind.reads == "kept":
        read = _build_read_kept(graphdef, request, pad_to_multiple_of, end_ids, correction_length)

    def score(
        params: Any, calibration: Calibration, batch: ResponseBatch, reference_log_probs: jax.Array | None = None
    ) -> TokenRewards:
        readings, tags = read(params, batch)
        values = kind.values(readings[kind.reads], batch.responses, batch.response_mask, reference_log_probs)
        return as_token_rewards(calibration, kind, values, tags, batch, end_ids)

    return score


def build_diagnostics(
    needs: Source,
    graphdef: nnx.GraphDef,
    *,
    request: tuple[int, ...],
    end_ids: tuple[int, ...],
    pad_to_multiple_of: int = 1,
) -> Callable[[Any, ResponseBatch, jax.Array | None], dict[str, dict[str, jax.Array]]]:
    """Function to the diagnostics of every kind that one reward model can give, uncalibrated, from one forward.

    A kind whose length effect must be fitted first is left out, and so is one that needs a reference where there are
    no reference log-probs, and ``edit_aligned``, which costs a generation. Arguments are those of `build_scorer`.

    Returns:
      ``(params, batch, reference_log_probs) -> {kind: {name: [B]}}``; names are those of
      `jaxrm.types.TokenRewards.diagnostics`.
    """
    read = _build_read(needs, graphdef, request, pad_to_multiple_of)

    def diagnostics(
        params: Any, batch: ResponseBatch, reference_log_probs: jax.Array | None
    ) -> dict[str, dict[str, jax.Array]]:
        readings, tags = read(params, batch)
        calibration = reward_scaling.uncalibrated()
        by_kind = {}
        for name, kind in token_rewards.KINDS.items():
            lacks_reference = kind.needs_reference and reference_log_probs is None
            if kind.needs != needs or kind.removes_length or lacks_reference or kind.reads == "kept":
                continue
            values = kind.values(readings[kind.reads], batch.responses, batch.response_mask, reference_log_probs)
            by_kind[name] = as_token_rewards(calibration, kind, values, tags, batch, end_ids).diagnostics
        return by_kind

    return diagnostics


def _build_read(
    needs: Source,
    graphdef: nnx.GraphDef,
    request: tuple[int, ...],
    pad_to_multiple_of: int,
    temperature: float = 1.0,
) -> Callable[[Any, ResponseBatch], tuple[dict[Reads, Any], jax.Array]]:
    """``(params, batch) -> readings by name, tags [B, T]``; see `Kind.reads`. A seq2seq model alone tags tokens -."""

    def read_seq2seq(params: Any, batch: ResponseBatch) -> tuple[dict[Reads, Any], jax.Array]:
        statistics = response_statistics(graphdef, params, batch, request, pad_to_multiple_of=pad_to_multiple_of)
        tags = token_rewards.token_tags(batch.responses, statistics.argmax, batch.response_mask)
        return {"tokens": statistics}, tags

    def read_scalar(params: Any, batch: ResponseBatch) -> tuple[dict[Reads, Any], jax.Array]:
        scores = prefix_scores(graphdef, params, batch, pad_to_multiple_of=pad_to_multiple_of)
        return {"prefixes": scores, "response": _of_whole(scores, batch)}, batch.response_mask

    def read_policy(params: Any, batch: ResponseBatch) -> tuple[dict[Reads, Any], jax.Array]:
        statistics = response_statistics(
            graphdef, params, batch, None, pad_to_multiple_of=pad_to_multiple_of, temperature=temperature
        )
        return {"tokens": statistics}, batch.response_mask

    return {"seq2seq": read_seq2seq, "scalar": read_scalar, "dpo": read_policy}[needs]


def _build_read_kept(
    graphdef: nnx.GraphDef,
    request: tuple[int, ...],
    pad_to_multiple_of: int,
    end_ids: tuple[int, ...],
    correction_length: int | None,
) -> Callable[[Any, ResponseBatch], tuple[dict[Reads, Any], jax.Array]]:
    """The same of a seq2seq model's own corrections: what they keep has tag +."""

    def read(params: Any, batch: ResponseBatch) -> tuple[dict[Reads, Any], jax.Array]:
        is_kept = kept_by_correction(
            graphdef,
            params,
            batch,
            _sources(batch, request, pad_to_multiple_of),
            max_new_tokens=correction_length or batch.responses.shape[1],
            end_ids=end_ids,
        )
        return {"kept": is_kept}, is_kept

    return read


def _of_whole(scores: jax.Array, batch: ResponseBatch) -> jax.Array:
    """Score ``[B]`` of each whole response, from the scores ``[B, T + 1]`` of its prefixes."""
    length = jnp.sum(batch.response_mask, axis=1, dtype=jnp.int32)
    return jnp.take_along_axis(scores, length[:, None], axis=1)[:, 0]


def build_score_step(
    score: Scorer,
    *,
    params_sharding: Any,
    batch_sharding: Any,
    output_sharding: Any = None,
    num_microbatches: int = 1,
) -> Callable[..., TokenRewards]:
    """Jitted `Scorer` over a mesh.

    Args:
      score: from `build_scorer`.
      params_sharding: pytree of shardings like the reward model's parameters.
      batch_sharding: sharding of the rows.
      output_sharding: of the results.
      num_microbatches: shares of the rows, one after another.

    Returns:
      ``(params, calibration, batch, reference_log_probs) -> TokenRewards``.
    """

    def step(params: Any, calibration: Calibration, batch: ResponseBatch, reference: jax.Array | None) -> TokenRewards:
        scored = microbatches.in_microbatches(lambda rows: score(params, calibration, *rows), num_microbatches)
        return scored((batch, reference))

    return jax.jit(
        step,
        in_shardings=(params_sharding, None, batch_sharding, batch_sharding),
        out_shardings=output_sharding,
    )


def as_token_rewards(
    calibration: Calibration,
    kind: Kind,
    values: jax.Array,
    tags: jax.Array,
    batch: ResponseBatch,
    end_ids: tuple[int, ...],
) -> TokenRewards:
    """Token rewards ``r_t`` of a kind's values, and their diagnostics.

    Args:
      calibration: scale and center.
      kind: of token reward.
      values: ``[B, T]`` float, ``u_t``.
      tags: ``[B, T]`` bool.
      batch: the responses.
      end_ids: tokens that end a response.
    """
    rewards = reward_scaling.apply(calibration, kind, values, batch.response_mask)
    return TokenRewards(rewards, values, tags, batch.response_mask, diagnose(rewards, tags, batch, end_ids))


def diagnose(
    rewards: jax.Array, tags: jax.Array, batch: ResponseBatch, end_ids: tuple[int, ...]
) -> dict[str, jax.Array]:
    """Diagnostics ``[B]`` float32 by name, see `jaxrm.types.TokenRewards`.

    Args:
      rewards: ``[B, T]`` float32.
      tags: ``[B, T]`` bool.
      batch: the responses.
      end_ids: tokens that end a response.
    """
    mask = batch.response_mask
    length = jnp.sum(mask, axis=1, dtype=jnp.float32)
    is_end = mask & jnp.any(batch.responses[..., None] == jnp.asarray(end_ids, jnp.int32)[None, None], axis=-1)
    return {
        "sum": masking.masked_sum(rewards, mask, axis=1),
        "mean": masking.masked_mean(rewards, mask, axis=1),
        "length": length,
        "tag_rate": masking.masked_mean(tags, mask, axis=1),
        "divergence": token_rewards.divergence(tags, mask).astype(jnp.float32),
        "ended": jnp.any(is_end, axis=1).astype(jnp.float32),
        "end_tag": jnp.any(tags & is_end, axis=1).astype(jnp.float32),
    }


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
