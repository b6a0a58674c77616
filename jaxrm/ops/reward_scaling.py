"""Scale and center: what makes token rewards ``r_t = a (u_t - c)`` of a kind's values ``u_t`` (jaxrm choice).

`calibrate` finds the numbers from a sample of responses, `apply` uses them, and `update_center` moves a running center.
Arrays are ``[B, T]``, and ``kind`` is a row of `jaxrm.ops.reward_kinds.KINDS`, or one that a user wrote.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrm.ops.masking import last_token, masked_mean, masked_sum
from jaxrm.ops.reward_kinds import Kind
from jaxrm.ops.token_rewards import check_arrays, inside_mask

# Sums that differ by no more than this share of their size differ by float32 rounding alone.
_ROUNDING = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibration:
    """What turns a kind's values into rewards; part of a checkpoint. Every field is a float32 scalar.

    Attributes:
      scale: ``a``, the size of a reward.
      center: ``c``, subtracted from each token's value before scaling; for kinds that are centered.
      length_slope: score per response token, taken off a score at its last token; for ``scalar_length_residual``.
      length_intercept: score of a response of length 0 on the same line.
    """

    scale: jax.Array
    center: jax.Array
    length_slope: jax.Array
    length_intercept: jax.Array


def uncalibrated() -> Calibration:
    """The calibration that leaves values as they are: scale 1, the rest 0."""
    zero = jnp.zeros((), jnp.float32)
    return Calibration(scale=jnp.ones((), jnp.float32), center=zero, length_slope=zero, length_intercept=zero)


def calibrate(
    kind: Kind,
    values: jax.Array,
    mask: jax.Array,
    *,
    scale: float | Literal["unit"],
    center: Literal["running", "fixed", "none"],
) -> Calibration:
    """Numbers for `apply`, from a sample of responses such as the SFT policy's (jaxrm choice).

    Responses of no token are not counted, so rows that pad a batch change nothing.

    Args:
      kind: of token reward.
      values: ``[N, T]`` float, ``u_t`` of this kind.
      mask: ``[N, T]`` bool.
      scale: ``a`` itself, or "unit" for the one that gives the responses' sums of rewards a standard deviation of 1.
        Where all sums are the same, to float32 rounding, it is 1.
      center: "running" and "fixed" take the mean value of a token here (a running center then moves on, by
        `update_center`), "none" takes 0. Only a kind that is centered has one.

    Returns:
      The calibration. For ``scalar_length_residual`` it holds the least-squares line of score by length in tokens; a
      flat one through the mean score where all lengths are the same.
    """
    assert center in ("running", "fixed", "none"), center
    assert scale == "unit" or scale > 0, scale
    check_arrays(mask, values, dtype=float)
    calibration = uncalibrated()
    if kind.is_centered and center != "none":
        calibration = dataclasses.replace(calibration, center=masked_mean(values, mask))
    if kind.removes_length:
        slope, intercept = _line_by_length(masked_sum(values, mask, axis=1), mask)
        calibration = dataclasses.replace(calibration, length_slope=slope, length_intercept=intercept)
    if scale == "unit":
        factor = _unit_scale(masked_sum(apply(calibration, kind, values, mask), mask, axis=1), values, mask)
    else:
        factor = jnp.asarray(scale, jnp.float32)
    return dataclasses.replace(calibration, scale=factor)


def apply(calibration: Calibration, kind: Kind, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Token rewards ``r_t = a (u_t - c)``.

    For ``scalar_length_residual``, ``a (u_t - length_slope T - length_intercept)`` on the last response token, with T
    the response's length. Only a kind that is centered uses ``c``.

    Args:
      calibration: from `calibrate`, or `uncalibrated`.
      kind: of token reward.
      values: ``[B, T]`` float, ``u_t`` of this kind.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    check_arrays(mask, values, dtype=float)
    values = values.astype(jnp.float32)
    if kind.is_centered:
        values = values - calibration.center
    elif kind.removes_length:
        expected = calibration.length_slope * _lengths(mask) + calibration.length_intercept
        values = values - jnp.where(last_token(mask), expected[:, None], 0.0)
    return inside_mask(mask, calibration.scale * values)


def update_center(
    calibration: Calibration,
    kind: Kind,
    values: jax.Array,
    mask: jax.Array,
    *,
    momentum: float,
) -> Calibration:
    """Moves a running center: ``c <- momentum c + (1 - momentum) mean(u)`` (jaxrm choice).

    Args:
      calibration: the present one; its scale stays.
      kind: of token reward; one that is not centered changes nothing.
      values: ``[B, T]`` float, ``u_t`` of this kind; their mean is over the batch's response tokens.
      mask: ``[B, T]`` bool; an empty one changes nothing.
      momentum: in [0, 1].

    Returns:
      The calibration with its center moved.
    """
    check_arrays(mask, values, dtype=float)
    if not kind.is_centered:
        return calibration
    moved = momentum * calibration.center + (1.0 - momentum) * masked_mean(values, mask)
    return dataclasses.replace(calibration, center=jnp.where(jnp.any(mask), moved, calibration.center))


def _lengths(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, axis=1, dtype=jnp.float32)


def _line_by_length(scores: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slope and intercept of the least-squares line of ``scores [N]`` by length, over the responses with a token."""
    lengths = _lengths(mask)
    counted = lengths > 0
    mean_length, mean_score = masked_mean(lengths, counted), masked_mean(scores, counted)
    from_mean = lengths - mean_length
    covariance = masked_mean(from_mean * (scores - mean_score), counted)
    variance = masked_mean(jnp.square(from_mean), counted)
    longest = jnp.max(lengths, where=counted, initial=0.0)
    shortest = jnp.min(lengths, where=counted, initial=mask.shape[1])
    # Compared as whole numbers: the variance of equal lengths need not be exactly 0 on every device.
    varied = longest > shortest
    slope = jnp.where(varied, covariance / jnp.where(varied, variance, 1.0), 0.0)
    return slope, mean_score - slope * mean_length


def _unit_scale(sums: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """One over the standard deviation of ``sums [N]`` over the responses with a token; 1 where that is rounding."""
    counted = jnp.any(mask, axis=1)
    deviation = jnp.sqrt(masked_mean(jnp.square(sums - masked_mean(sums, counted)), counted))
    size = masked_mean(masked_sum(jnp.abs(values), mask, axis=1), counted)
    # NaN is no constant: it passes on, so that a sick reward model is seen.
    constant = deviation <= _ROUNDING * size
    return 1.0 / jnp.where(constant, 1.0, deviation)
