"""Rewards that add up: token rewards of several sources as one, and what each has in the sum.

    r_t = sum_i w_i r_t^i

with the weight ``w_i`` of source ``i`` and its calibrated token rewards ``r_t^i``. Sources are added in the order of
their names, so that a config says the same in whatever order it names them.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.algorithms import scoring
from jaxrm.ops import masking
from jaxrm.types import ResponseBatch, TokenRewards

_ROUNDING = 1e-6  # numbers that differ by no more than this share of their mean are equal but for float32 rounding


def sum_rewards(
    parts: Mapping[str, TokenRewards], batch: ResponseBatch, *, weights: Mapping[str, float], end_ids: tuple[int, ...]
) -> TokenRewards:
    """The sum of token rewards.

    A source of weight 0 adds nothing. A token has tag + where every other source has.

    Args:
      parts: of each source, calibrated, by name.
      batch: the responses.
      weights: of each source; one at least is not 0.
      end_ids: ids that end a response.
    """
    mask = batch.response_mask
    added = sorted(name for name in parts if weights[name] != 0)
    rewards = jnp.zeros(mask.shape, jnp.float32)
    values, tags = rewards, jnp.ones(mask.shape, bool)
    for name in added:
        rewards = rewards + weights[name] * parts[name].rewards
        values = values + weights[name] * parts[name].values
        tags = tags & parts[name].tags
    diagnostics = scoring.diagnose(rewards, tags, batch, end_ids)
    return TokenRewards(rewards, values, tags, mask, diagnostics, dict(parts))


def source_metrics(
    parts: Mapping[str, TokenRewards], mask: jax.Array, weights: Mapping[str, float]
) -> dict[str, jax.Array]:
    """What each source gives a batch of responses; see `metrics_of_sums`.

    Args:
      parts: of each source, calibrated, by name.
      mask: ``[B, T]`` bool.
      weights: of each source.
    """
    sums = {name: masking.masked_sum(part.rewards, mask, axis=1) for name, part in parts.items()}
    return metrics_of_sums(sums, jnp.sum(mask, axis=1), weights)


def metrics_of_sums(
    sums: Mapping[str, jax.Array | np.ndarray], lengths: jax.Array | np.ndarray, weights: Mapping[str, float]
) -> dict[str, jax.Array]:
    """What each source gives: float32 scalars, over the responses with a token.

    - ``reward/NAME``: mean sum of its rewards over a response, before its weight.
    - ``reward_share/NAME``: how much of what tells responses apart is its own, ``|w_i| s_i / sum_j |w_j| s_j``, with
      ``s_i`` the standard deviation of those sums. Neither signs nor constants matter, as they do not to advantages;
      0 where all responses have the same (jaxrm choice).
    - ``reward_length_correlation/NAME``: Pearson correlation of those sums with the lengths in tokens.
    - ``reward_correlation/A/B``: the same between two sources, in the order of their names.

    Args:
      sums: ``[B]``, sum of the calibrated rewards of each response, by source.
      lengths: ``[B]``, tokens of each response.
      weights: of each source.
    """
    length = jnp.asarray(lengths, jnp.float32)
    counted = length > 0
    by_name = {name: jnp.asarray(sums[name], jnp.float32) for name in sorted(sums)}
    spread = {name: abs(weights[name]) * _deviation(x, counted) for name, x in by_name.items()}
    total = sum(spread.values(), start=jnp.zeros((), jnp.float32))
    metrics = {}
    for name, x in by_name.items():
        metrics[f"reward/{name}"] = masking.masked_mean(x, counted)
        metrics[f"reward_share/{name}"] = jnp.where(total > 0, spread[name] / jnp.where(total > 0, total, 1.0), 0.0)
        metrics[f"reward_length_correlation/{name}"] = correlation(x, length, counted)
    for a, b in itertools.combinations(by_name, 2):
        metrics[f"reward_correlation/{a}/{b}"] = correlation(by_name[a], by_name[b], counted)
    return metrics


def metrics_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`metrics_of_sums` of rows of a file; ``{}`` where rewards are of one source.

    Args:
      rows: of one response each, with its ``length`` and the ``sources`` of its reward, ``{name: {"weight": 0.5,
        "reward": 1.25}}``.
    """
    weights = {name: source["weight"] for name, source in rows[0].get("sources", {}).items()}
    sums = {name: np.asarray([row["sources"][name]["reward"] for row in rows]) for name in weights}
    metrics = metrics_of_sums(sums, np.asarray([row["length"] for row in rows]), weights)
    return {name: float(x) for name, x in metrics.items()}


def correlation(a: jax.Array, b: jax.Array, counted: jax.Array) -> jax.Array:
    """Pearson correlation ``[]`` of ``a [B]`` and ``b [B]`` where ``counted [B]``; 0 where one of them is constant."""
    deviations = _deviation(a, counted) * _deviation(b, counted)
    from_mean = [x - masking.masked_mean(x, counted) for x in (a, b)]
    covariance = masking.masked_mean(from_mean[0] * from_mean[1], counted)
    # Rounding must not take it past its bounds.
    return jnp.clip(jnp.where(deviations > 0, covariance / jnp.where(deviations > 0, deviations, 1.0), 0.0), -1, 1)


def _deviation(x: jax.Array, counted: jax.Array) -> jax.Array:
    """Standard deviation ``[]`` of ``x [B]`` where ``counted [B]``; 0 where it is rounding of equal numbers."""
    mean = masking.masked_mean(x, counted)
    deviation = jnp.sqrt(masking.masked_mean(jnp.square(x - mean), counted))
    # NaN is no constant: it passes on, so that a sick source is seen.
    return jnp.where(deviation <= _ROUNDING * jnp.abs(mean), 0.0, deviation)
