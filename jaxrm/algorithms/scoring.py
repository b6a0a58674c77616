"""Reward model, prompts and responses to token rewards, by one forward pass.

A seq2seq reward model needs no decoding for it: up to the first token where its greedy output differs from the
response, greedy and forced context are the same, and from there on the response is fed to it anyway (arXiv 2409.00162,
Figure 2). So one pass over ``template(x, y), y`` gives the greedy token at every place, and with it every tag.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.algorithms import microbatches
from jaxrm.algorithms.corrections import kept_by_correction
from jaxrm.algorithms.reading import _of_whole, _sources, prefix_scores, response_statistics
from jaxrm.ops import masking, reward_kinds, reward_scaling, token_rewards
from jaxrm.ops.reward_kinds import Kind, Reads, Source
from jaxrm.ops.reward_scaling import Calibration
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


def build_scorer(kind: Kind, graphdef: nnx.GraphDef, **options: Any) -> Scorer:
    """Scorer of a reward model: one forward pass, the kind's values, scale and center.

    Arguments are those of `build_joint_scorer`.
    """
    joint = build_joint_scorer({"": kind}, graphdef, **options)

    def score(
        params: Any, calibration: Calibration, batch: ResponseBatch, reference_log_probs: jax.Array | None = None
    ) -> TokenRewards:
        return joint(params, {"": calibration}, batch, reference_log_probs)[""]

    return score


def build_joint_scorer(
    kinds: Mapping[str, Kind],
    graphdef: nnx.GraphDef,
    *,
    request: tuple[int, ...],
    end_ids: tuple[int, ...],
    pad_to_multiple_of: int = 1,
    temperature: float = 1.0,
    correction_length: int | None = None,
) -> Callable[[Any, Mapping[str, Calibration], ResponseBatch, jax.Array | None], dict[str, TokenRewards]]:
    """Token rewards of several kinds by name from one forward pass of a reward model, as a `Scorer` gives one kind's.

    The kind ``edit_aligned`` has the model write its correction of each response, and compares the two; it is alone.

    Args:
      kinds: of token reward; they say which sort of reward model ``graphdef`` must be.
      graphdef: of the decoder of a seq2seq reward model, or of a scalar model.
      request: see `response_statistics`; a scalar reward model does not read it.
      end_ids: tokens that end a response.
      pad_to_multiple_of: see `response_hidden`.
      temperature: of sampling, at which a policy of DPO is read, as its reference is; no reward model is.
      correction_length: most tokens of a correction, where the kind has one written; None for as many as the batch's
        responses may have.

    Returns:
      ``(params, calibrations by name, batch, reference_log_probs) -> TokenRewards by name``.
    """
    (needs,) = {kind.needs for kind in kinds.values()}
    read = _build_read(needs, graphdef, request, pad_to_multiple_of, temperature)
    if any(kind.needs_correction for kind in kinds.values()):
        assert len(kinds) == 1, kinds
        read = _build_read_alignment(graphdef, request, pad_to_multiple_of, end_ids, correction_length)

    def score(
        params: Any, calibrations: Mapping[str, Calibration], batch: ResponseBatch, reference: jax.Array | None
    ) -> dict[str, TokenRewards]:
        readings, tags = read(params, batch)
        rewards = {}
        for name, kind in kinds.items():
            values = kind.values(readings[kind.reads], batch.responses, batch.response_mask, reference)
            rewards[name] = as_token_rewards(calibrations[name], kind, values, tags, batch, end_ids)
        return rewards

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
        for name, kind in reward_kinds.KINDS.items():
            lacks_reference = kind.needs_reference and reference_log_probs is None
            if kind.needs != needs or kind.removes_length or lacks_reference or kind.needs_correction:
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


def _build_read_alignment(
    graphdef: nnx.GraphDef,
    request: tuple[int, ...],
    pad_to_multiple_of: int,
    end_ids: tuple[int, ...],
    correction_length: int | None,
) -> Callable[[Any, ResponseBatch], tuple[dict[Reads, Any], jax.Array]]:
    """The same of a seq2seq model's own corrections: what they keep has tag +."""

    def read(params: Any, batch: ResponseBatch) -> tuple[dict[Reads, Any], jax.Array]:
        stays = kept_by_correction(
            graphdef,
            params,
            batch,
            _sources(batch, request, pad_to_multiple_of),
            max_new_tokens=correction_length or batch.responses.shape[1],
            end_ids=end_ids,
        )
        return {"alignment": stays}, stays

    return read


def build_score_step(
    score: Callable[[Any, Any, ResponseBatch, jax.Array | None], Any],
    *,
    params_sharding: Any,
    batch_sharding: Any,
    output_sharding: Any = None,
    num_microbatches: int = 1,
) -> Callable[..., Any]:
    """Jitted `Scorer` over a mesh.

    Args:
      score: from `build_scorer`, or `build_joint_scorer`.
      params_sharding: pytree of shardings like the reward model's parameters.
      batch_sharding: sharding of the rows.
      output_sharding: of the results.
      num_microbatches: shares of the rows, one after another.

    Returns:
      ``(params, calibration, batch, reference_log_probs) -> TokenRewards``, or these by name.
    """

    def step(params: Any, calibration: Any, batch: ResponseBatch, reference: jax.Array | None) -> Any:
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
