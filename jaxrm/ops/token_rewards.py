"""Token rewards: what a reward model says about each token of a response.

The extraction rule of "Sequence to Sequence Reward Modeling" (arXiv 2409.00162, section 3, Figure 2): a token earns a
positive score until the response diverges from what the reward model writes; from there the response is fed token
by token, and the tokens that the reward model would not have written earn a negative one. With the whole response
as its source, one teacher-forced pass gives every tag: up to the first mismatch greedy output and response are the
same, and after it the rule itself feeds the response.

Arrays are ``[B, T]`` and indexed by the response token; ``mask`` is the response's, and outside it every output is 0
whatever the inputs hold there. A response of no token is legal. ``u_t`` is a kind's value (`literal` ... `scalar`),
and the token reward is ``r_t = a (u_t - c)``: `calibrate` finds the numbers, `apply` uses them.
"""

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from jaxrm.ops.masking import last_token, masked_mean, masked_sum

KINDS = ("literal", "signed", "prefix", "soft", "margin", "contrast", "scalar", "scalar_length_residual")

# Tags and soft values pay for every token that is written; the other kinds have a zero of their own.
CENTERED = ("literal", "signed", "prefix", "soft")


def is_centered(kind: str) -> bool:
    """Whether a kind has a centre taken off; a user's own, ``module:function``, has one as tags have."""
    return kind in CENTERED or ":" in kind


def _is_kind(kind: str) -> bool:
    return kind in KINDS or ":" in kind


# Sums that differ by no more than this share of their size differ by float32 rounding alone.
_ROUNDING = 1e-5


# --- tags


def token_tags(responses: jax.Array, argmax: jax.Array, mask: jax.Array) -> jax.Array:
    """Whether the reward model would have written each token itself: ``s_t = + iff y_t = argmax_v q(v | c, y_<t)``.

    Args:
      responses: ``[B, T]`` int token ids.
      argmax: ``[B, T]`` int, the most likely token at each position with the response fed to it.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` bool: True is +; False is - or padding.
    """
    _check(mask, responses, argmax, dtype=int)
    return (responses == argmax) & mask


def divergence(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """Where a response leaves the reward model's: how many of its tokens come before the first - tag.

    Args:
      tags: ``[B, T]`` bool.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B]`` int32, the index of the first - tag among the response's tokens; its length where there is none.
    """
    _check(mask, tags, dtype=bool)
    return jnp.sum(_before_divergence(tags, mask), axis=1, dtype=jnp.int32)


# --- values, by kind


def literal(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """The paper's rule: +1 before the divergence, -1 on every - tag, 0 on + tags after the divergence.

    Args:
      tags: ``[B, T]`` bool.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    _check(mask, tags, dtype=bool)
    return _inside(mask, jnp.where(_before_divergence(tags, mask), 1.0, jnp.where(tags, 0.0, -1.0)))


def signed(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """+1 on + tags and -1 on - tags, wherever they stand (jaxrm choice, an ablation). Shapes as in `literal`."""
    _check(mask, tags, dtype=bool)
    return _inside(mask, jnp.where(tags, 1.0, -1.0))


def prefix(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """+1 before the divergence and -1 from it on (jaxrm choice, an ablation). Shapes as in `literal`."""
    _check(mask, tags, dtype=bool)
    return _inside(mask, jnp.where(_before_divergence(tags, mask), 1.0, -1.0))


def soft(log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """``clip(2 q(y_t | c, y_<t) - 1, -1, 1)``: a tag by degrees (jaxrm choice, after RLMEC, arXiv 2401.06081).

    Args:
      log_probs: ``[B, T]`` float, log-prob of the response's token under the reward model.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    _check(mask, log_probs, dtype=float)
    return _inside(mask, jnp.clip(2.0 * jnp.exp(log_probs.astype(jnp.float32)) - 1.0, -1.0, 1.0))


def margin(log_probs: jax.Array, max_log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """``max(log q(y_t | c, y_<t) - max_v log q(v | c, y_<t), -1)``: never positive, so no length pays (jaxrm choice).

    Args:
      log_probs: ``[B, T]`` float, log-prob of the response's token under the reward model.
      max_log_probs: ``[B, T]`` float, log-prob of the most likely token there.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    _check(mask, log_probs, max_log_probs, dtype=float)
    return _inside(mask, jnp.clip(log_probs.astype(jnp.float32) - max_log_probs.astype(jnp.float32), -1.0, 0.0))


def contrast(log_probs: jax.Array, reference_log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """``clip(log q(y_t | c, y_<t) - log pi_ref(y_t | x, y_<t), -1, 1)`` (jaxrm choice, after RTO, arXiv 2404.18922).

    Experimental: it pays for any rare token that the reward model copies from its source.

    Args:
      log_probs: ``[B, T]`` float, log-prob of the response's token under the reward model.
      reference_log_probs: ``[B, T]`` float, its log-prob under the reference policy.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    _check(mask, log_probs, reference_log_probs, dtype=float)
    return _inside(mask, jnp.clip(log_probs.astype(jnp.float32) - reference_log_probs.astype(jnp.float32), -1.0, 1.0))


def scalar(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """A scalar reward model's score on the last response token, 0 on the others.

    Args:
      scores: ``[B]`` float; that of a response of no token is not looked at.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    _check(mask)
    chex.assert_shape(scores, (mask.shape[0],))
    chex.assert_type(scores, float)
    return jnp.where(last_token(mask), scores.astype(jnp.float32)[:, None], 0.0)


# --- scale and centre


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibration:
    """What turns a kind's values into rewards; part of a checkpoint. Every field is a float32 scalar.

    Attributes:
      scale: ``a``, the size of a reward.
      center: ``c``, subtracted from each token's value before scaling; for tags and soft values.
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
    kind: str,
    values: jax.Array,
    mask: jax.Array,
    *,
    scale: float | Literal["unit"],
    center: Literal["running", "fixed", "none"],
) -> Calibration:
    """Numbers for `apply`, from a sample of responses such as the SFT policy's (jaxrm choice).

    Responses of no token are not counted, so rows that pad a batch change nothing.

    Args:
      kind: one of `KINDS`, or a user's own.
      values: ``[N, T]`` float, ``u_t`` of this kind.
      mask: ``[N, T]`` bool.
      scale: ``a`` itself, or "unit" for the one that gives the responses' sums of rewards a standard deviation of 1.
        Where all sums are the same, to float32 rounding, it is 1.
      center: "running" and "fixed" take the mean value of a token here (a running centre then moves on, by
        `update_center`), "none" takes 0. Only ``literal``, ``signed``, ``prefix`` and ``soft`` have one.

    Returns:
      The calibration. For ``scalar_length_residual`` it holds the least-squares line of score by length in tokens; a
      flat one through the mean score where all lengths are the same.
    """
    assert _is_kind(kind), kind
    assert center in ("running", "fixed", "none"), center
    assert scale == "unit" or scale > 0, scale
    _check(mask, values, dtype=float)
    calibration = uncalibrated()
    if is_centered(kind) and center != "none":
        calibration = dataclasses.replace(calibration, center=masked_mean(values, mask))
    if kind == "scalar_length_residual":
        slope, intercept = _line_by_length(masked_sum(values, mask, axis=1), mask)
        calibration = dataclasses.replace(calibration, length_slope=slope, length_intercept=intercept)
    if scale == "unit":
        factor = _unit_scale(masked_sum(apply(calibration, kind, values, mask), mask, axis=1), values, mask)
    else:
        factor = jnp.asarray(scale, jnp.float32)
    return dataclasses.replace(calibration, scale=factor)


def apply(calibration: Calibration, kind: str, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Token rewards ``r_t = a (u_t - c)``.

    For ``scalar_length_residual``, ``a (u_t - length_slope T - length_intercept)`` on the last response token, with T
    the response's length; ``c`` is used by ``literal``, ``signed``, ``prefix`` and ``soft`` alone.

    Args:
      calibration: from `calibrate`, or `uncalibrated`.
      kind: one of `KINDS`, or a user's own.
      values: ``[B, T]`` float, ``u_t`` of this kind.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    assert _is_kind(kind), kind
    _check(mask, values, dtype=float)
    values = values.astype(jnp.float32)
    if is_centered(kind):
        values = values - calibration.center
    elif kind == "scalar_length_residual":
        expected = calibration.length_slope * _lengths(mask) + calibration.length_intercept
        values = values - jnp.where(last_token(mask), expected[:, None], 0.0)
    return _inside(mask, calibration.scale * values)


def update_center(
    calibration: Calibration,
    kind: str,
    values: jax.Array,
    mask: jax.Array,
    *,
    momentum: float,
) -> Calibration:
    """Moves a running centre: ``c <- momentum c + (1 - momentum) mean(u)`` (jaxrm choice).

    Args:
      calibration: the present one; its scale stays.
      kind: one of `KINDS`; one that has no centre changes nothing.
      values: ``[B, T]`` float, ``u_t`` of this kind; their mean is over the batch's response tokens.
      mask: ``[B, T]`` bool; an empty one changes nothing.
      momentum: in [0, 1].

    Returns:
      The calibration with its centre moved.
    """
    assert _is_kind(kind), kind
    _check(mask, values, dtype=float)
    if not is_centered(kind):
        return calibration
    moved = momentum * calibration.center + (1.0 - momentum) * masked_mean(values, mask)
    return dataclasses.replace(calibration, center=jnp.where(jnp.any(mask), moved, calibration.center))


# --- private


def _check(mask: jax.Array, *arrays: jax.Array, dtype: type = float) -> None:
    """`mask` is ``[B, T]`` bool and the others are of its shape and of the one type."""
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    chex.assert_equal_shape([mask, *arrays])
    chex.assert_type(arrays, dtype)


def _inside(mask: jax.Array, values: jax.Array) -> jax.Array:
    # Python's numbers alone make a weakly typed array, which would turn bfloat16 beside a bfloat16 one.
    return jnp.where(mask, values, 0.0).astype(jnp.float32)


def _before_divergence(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """``[B, T]`` bool, True on the response tokens that no - tag precedes and that are + themselves."""
    return mask & (jnp.cumsum(mask & ~tags, axis=1) == 0)


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
