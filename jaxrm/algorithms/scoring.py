"""Reward model, prompts and responses to token rewards, by one forward pass.

A seq2seq reward model needs no decoding for it: up to the first token where its greedy output differs from the
response, greedy and forced context are the same, and from there on the response is fed to it anyway (arXiv 2409.00162,
Figure 2). So one pass over ``template(x, y), y`` gives the greedy token at every place, and with it every tag.
"""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.algorithms import microbatches
from jaxrm.algorithms.reward_config import SCALAR_KINDS, SEQ2SEQ_KINDS
from jaxrm.errors import UserError, flag, option
from jaxrm.models.transformer import Decoder
from jaxrm.ops import masking, token_rewards, vocab
from jaxrm.types import ResponseBatch, TokenRewards


class Scorer(Protocol):
    """Token rewards of responses; what stands behind it cannot be told from what it returns."""

    def __call__(
        self,
        params: Any,
        calibration: token_rewards.Calibration,
        batch: ResponseBatch,
        reference_log_probs: jax.Array | None = None,
    ) -> TokenRewards:
        """Score a batch; ``reference_log_probs [B, T]`` only where the kind is ``contrast``."""
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

    ``temperature`` divides the logits, as it does in sampling. Only states before response tokens meet the vocabulary.
    """
    softcap = model.config.logit_softcap
    return vocab.token_statistics(
        hidden, model.head_embedding, batch.responses, softcap=softcap, temperature=temperature
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


def response_scores(
    graphdef: nnx.GraphDef, params: Any, batch: ResponseBatch, *, pad_to_multiple_of: int = 1
) -> jax.Array:
    """Reward ``[B]`` of a scalar reward model, float32, read from the last token of each response."""
    model = nnx.merge(graphdef, params)
    tokens, mask, start = _rows(batch, None, pad_to_multiple_of)
    rewards = model(tokens, positions=_positions(tokens), segment_ids=mask.astype(jnp.int32))
    last = jnp.maximum(start + jnp.sum(batch.response_mask, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.take_along_axis(rewards, last[:, None], axis=1)[:, 0]


def token_values(
    kind: str,
    statistics: vocab.TokenStatistics,
    batch: ResponseBatch,
    reference_log_probs: jax.Array | None = None,
) -> jax.Array:
    """Values ``u_t [B, T]`` of a kind, float32, before scale and centre.

    A kind of one's own is ``package.module:function``, the name of a Python function
    ``(statistics, responses [B, T], mask [B, T]) -> values [B, T]`` in jax, for instance::

        def doubt(statistics, responses, mask):
            return statistics.log_probs - statistics.max_log_prob  # how much less likely than the best token

    Args:
      kind: one of `SEQ2SEQ_KINDS`, or one's own.
      statistics: of the seq2seq reward model, from `response_statistics`.
      batch: the responses.
      reference_log_probs: ``[B, T]`` of the reference policy, for ``contrast``.
    """
    mask = batch.response_mask
    if kind == "soft":
        return token_rewards.soft(statistics.log_probs, mask)
    if kind == "margin":
        return token_rewards.margin(statistics.log_probs, statistics.max_log_prob, mask)
    if kind == "contrast":
        assert reference_log_probs is not None, "contrast compares with a reference policy"
        return token_rewards.contrast(statistics.log_probs, reference_log_probs, mask)
    if ":" in kind:
        values = custom_kind(kind)(statistics, batch.responses, mask)
        if getattr(values, "shape", None) != mask.shape:
            raise UserError(
                f"{option('reward.kind')} is {kind!r}, whose function returned "
                f"{getattr(values, 'shape', type(values))}; "
                f"required one number for each response token, an array of shape {mask.shape}"
            )
        return jnp.where(mask, values, 0.0).astype(jnp.float32)
    tags = token_rewards.token_tags(batch.responses, statistics.argmax, mask)
    if kind == "literal":
        return token_rewards.literal(tags, mask)
    if kind == "signed":
        return token_rewards.signed(tags, mask)
    assert kind == "prefix", kind
    return token_rewards.prefix(tags, mask)


def custom_kind(kind: str) -> Callable[[vocab.TokenStatistics, jax.Array, jax.Array], jax.Array]:
    """The function that a kind of one's own names.

    Raises:
      UserError: where it cannot be imported.
    """
    module_name, _, name = kind.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{option('reward.kind')} is {kind!r}, but importing it raised {type(error).__name__}: {error}; required "
            f"package.module:function of a module that python finds from here, e.g. {flag('reward.kind')}=literal"
        ) from error
    return function


def seq2seq_scorer(
    graphdef: nnx.GraphDef,
    kind: str,
    *,
    request: tuple[int, ...],
    end_ids: tuple[int, ...],
    pad_to_multiple_of: int = 1,
) -> Scorer:
    """Scorer behind which stands a seq2seq reward model.

    Args:
      graphdef: of the decoder.
      kind: one of `SEQ2SEQ_KINDS`.
      request: see `response_statistics`.
      end_ids: tokens that end a response.
      pad_to_multiple_of: see `response_statistics`.
    """
    assert kind in SEQ2SEQ_KINDS or ":" in kind, kind

    def score(
        params: Any,
        calibration: token_rewards.Calibration,
        batch: ResponseBatch,
        reference_log_probs: jax.Array | None = None,
    ) -> TokenRewards:
        statistics = response_statistics(graphdef, params, batch, request, pad_to_multiple_of=pad_to_multiple_of)
        values = token_values(kind, statistics, batch, reference_log_probs)
        tags = token_rewards.token_tags(batch.responses, statistics.argmax, batch.response_mask)
        return as_token_rewards(calibration, kind, values, tags, batch, end_ids)

    return score


def scalar_scorer(
    graphdef: nnx.GraphDef, kind: str, *, end_ids: tuple[int, ...], pad_to_multiple_of: int = 1
) -> Scorer:
    """Scorer behind which stands a scalar reward model; arguments as for `seq2seq_scorer`, kind of `SCALAR_KINDS`."""
    assert kind in SCALAR_KINDS, kind

    def score(
        params: Any,
        calibration: token_rewards.Calibration,
        batch: ResponseBatch,
        reference_log_probs: jax.Array | None = None,
    ) -> TokenRewards:
        del reference_log_probs
        scores = response_scores(graphdef, params, batch, pad_to_multiple_of=pad_to_multiple_of)
        values = token_rewards.scalar(scores, batch.response_mask)
        return as_token_rewards(calibration, kind, values, batch.response_mask, batch, end_ids)

    return score


def seq2seq_diagnostics(
    graphdef: nnx.GraphDef, *, request: tuple[int, ...], end_ids: tuple[int, ...], pad_to_multiple_of: int = 1
) -> Callable[[Any, ResponseBatch, jax.Array | None], dict[str, dict[str, jax.Array]]]:
    """Function to the diagnostics of every kind of token reward, uncalibrated, from one forward.

    ``(params, batch, reference_log_probs) -> {kind: {name: [B]}}``; names are those of
    `jaxrm.types.TokenRewards.diagnostics`. ``contrast`` is left out where there are no reference log-probs.
    """

    def diagnostics(
        params: Any, batch: ResponseBatch, reference_log_probs: jax.Array | None
    ) -> dict[str, dict[str, jax.Array]]:
        statistics = response_statistics(graphdef, params, batch, request, pad_to_multiple_of=pad_to_multiple_of)
        tags = token_rewards.token_tags(batch.responses, statistics.argmax, batch.response_mask)
        kinds = [kind for kind in SEQ2SEQ_KINDS if kind != "contrast" or reference_log_probs is not None]
        values = {kind: token_values(kind, statistics, batch, reference_log_probs) for kind in kinds}
        plain = token_rewards.uncalibrated()
        return {kind: as_token_rewards(plain, kind, values[kind], tags, batch, end_ids).diagnostics for kind in kinds}

    return diagnostics


def scalar_diagnostics(
    graphdef: nnx.GraphDef, *, end_ids: tuple[int, ...], pad_to_multiple_of: int = 1
) -> Callable[[Any, ResponseBatch, jax.Array | None], dict[str, dict[str, jax.Array]]]:
    """As `seq2seq_diagnostics` for a scalar reward model, whose kind ``scalar`` alone needs no calibration."""
    score = scalar_scorer(graphdef, "scalar", end_ids=end_ids, pad_to_multiple_of=pad_to_multiple_of)

    def diagnostics(
        params: Any, batch: ResponseBatch, reference_log_probs: jax.Array | None
    ) -> dict[str, dict[str, jax.Array]]:
        del reference_log_probs
        return {"scalar": score(params, token_rewards.uncalibrated(), batch).diagnostics}

    return diagnostics


def build_score_step(
    score: Scorer,
    *,
    params_sharding: Any,
    batch_sharding: Any,
    output_sharding: Any = None,
    num_microbatches: int = 1,
) -> Callable[..., TokenRewards]:
    """Jitted `Scorer` over a mesh; rows lie as ``batch_sharding`` says, results as ``output_sharding``."""

    def step(
        params: Any, calibration: token_rewards.Calibration, batch: ResponseBatch, reference: jax.Array | None
    ) -> TokenRewards:
        return microbatches.in_parts(lambda part: score(params, calibration, *part), num_microbatches)(
            (batch, reference)
        )

    return jax.jit(
        step,
        in_shardings=(params_sharding, None, batch_sharding, batch_sharding),
        out_shardings=output_sharding,
    )


def as_token_rewards(
    calibration: token_rewards.Calibration,
    kind: str,
    values: jax.Array,
    tags: jax.Array,
    batch: ResponseBatch,
    end_ids: tuple[int, ...],
) -> TokenRewards:
    """Token rewards of values ``u_t [B, T]`` of a kind, with their diagnostics; ``tags [B, T]`` bool."""
    mask = batch.response_mask
    rewards = token_rewards.apply(calibration, kind, values, mask)
    length = jnp.sum(mask, axis=1, dtype=jnp.float32)
    is_end = mask & jnp.any(batch.responses[..., None] == jnp.asarray(end_ids, jnp.int32)[None, None], axis=-1)
    diagnostics = {
        "sum": masking.masked_sum(rewards, mask, axis=1),
        "mean": masking.masked_mean(rewards, mask, axis=1),
        "length": length,
        "tag_rate": masking.masked_mean(tags, mask, axis=1),
        "divergence": token_rewards.divergence(tags, mask).astype(jnp.float32),
        "ended": jnp.any(is_end, axis=1).astype(jnp.float32),
        "end_tag": jnp.any(tags & is_end, axis=1).astype(jnp.float32),
    }
    return TokenRewards(rewards, values, tags, mask, diagnostics)


def _rows(
    batch: ResponseBatch, request: tuple[int, ...] | None, multiple: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows ``x, y`` or ``x, y, request, y``: tokens and mask ``[B, W]``, and where the last part starts ``[B]``.

    Without gaps, since a sliding window counts the tokens of a row, padding included.
    """
    P, T = batch.prompts.shape[1], batch.responses.shape[1]
    prompt_length = jnp.sum(batch.prompt_mask, axis=1, dtype=jnp.int32)[:, None]
    length = jnp.sum(batch.response_mask, axis=1, dtype=jnp.int32)[:, None]
    asked = jnp.asarray(request or (), jnp.int32)
    R = len(request or ())
    width = P + T if request is None else P + T + R + T
    index = jnp.arange(-(-width // multiple) * multiple, dtype=jnp.int32)[None, :]

    def part(source: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(source, jnp.clip(at, 0, source.shape[1] - 1), axis=1)

    start = prompt_length
    tokens = jnp.where(
        index < prompt_length, part(batch.prompts, index + P - prompt_length), part(batch.responses, index - start)
    )
    if request is not None:
        asked_at = prompt_length + length
        start = asked_at + R
        again = part(batch.responses, index - start)
        if R:
            again = jnp.where(index < start, asked[jnp.clip(index - asked_at, 0, R - 1)], again)
        tokens = jnp.where(index < asked_at, tokens, again)
    mask = index < start + length
    return jnp.where(mask, tokens, 0), mask, start[:, 0]


def _positions(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
