"""The scalar reward model: Bradley-Terry on pairs, the baseline that the seq2seq reward model replaces."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.algorithms.train_step import LossFn
from jaxrm.config.fields import at_least, bounded, check, finite
from jaxrm.ops import losses, masking
from jaxrm.types import ComparisonBatch, MarkedComparisonBatch


@dataclass(frozen=True)
class ScalarRMConfig:
    """Options of the scalar reward model's loss.

    Attributes:
      margin: by how much the chosen response should win (Touvron et al. 2023, arXiv 2307.09288).
      l2: coefficient on the squares of the rewards, which keeps them near 0; without it the loss says nothing of their
        level.
      prefix_coef: coefficient on the squared error of the score of each prefix of a response, the empty one included,
        to that of the whole response. It makes the head a value function (TCRM, arXiv 2604.22981), for rewards of the
        kind ``value_difference`` and for ``config.critic.head=reward_model``.
      neighbor_coef: coefficient on the squared difference between the scores of a prefix and of the one that is a token
        longer (the same paper), which are what ``value_difference`` pays.
    """

    margin: float = bounded(0.0, at_least(0), finite)
    l2: float = bounded(0.0, at_least(0), finite)
    prefix_coef: float = bounded(0.0, at_least(0), finite)
    neighbor_coef: float = bounded(0.0, at_least(0), finite)

    def __post_init__(self) -> None:
        check(self)

    @property
    def reads_prefixes(self) -> bool:
        """Whether the loss looks at the scores of prefixes, so that it needs to know the tokens of the responses."""
        return self.prefix_coef > 0 or self.neighbor_coef > 0


def scalar_rm_loss(graphdef: nnx.GraphDef, config: ScalarRMConfig = ScalarRMConfig()) -> LossFn:
    """Loss of a scalar reward model (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155).

        L = mean_pairs -log sigma(r(x, y+) - r(x, y-) - margin) + l2/2 (r(x, y+)^2 + r(x, y-)^2)

    r is read from the last response token. With the options that make a value function of it, for both responses y of
    n tokens of each pair,

        L += prefix_coef/2 mean_t (r(x, y_<t) - r(x, y))^2 + neighbor_coef/2 mean_t (r(x, y_<=t) - r(x, y_<t))^2

    whose means are over the n tokens. In the first, r(x, y) is a target without a gradient (jaxrm choice): else the
    whole score would be drawn towards those of prefixes, and lose what the comparison says.

    Args:
      graphdef: of the `jaxrm.models.heads.ScalarModel`.
      config: the section ``scalar_rm``.

    Returns:
      ``loss_fn(params, ComparisonBatch, key)``; with those options the batch is a `MarkedComparisonBatch`. Aux has
      ``accuracy`` (share of pairs whose chosen response has the higher reward; a tie counts half), ``reward_gap``
      (chosen less rejected), ``reward_chosen`` and ``reward_rejected``; with those options ``prefix_error`` and
      ``neighbor_error``, means over responses.
    """

    def loss_fn(params: Any, batch: ComparisonBatch, key: jax.Array) -> Any:
        del key  # no dropout
        model = nnx.merge(graphdef, params)
        rewards = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        # Both sides of a pair lie in one row, so a pair never crosses devices or microbatches.
        index = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None, :]
        partner = jnp.where(batch.is_chosen_end, index + batch.rejected_offset, 0)
        chosen, rejected = rewards, jnp.take_along_axis(rewards, partner, axis=1)
        loss = losses.bradley_terry_loss(chosen, rejected, margin=config.margin)
        loss += 0.5 * config.l2 * (chosen**2 + rejected**2)

        pairs, count = batch.is_chosen_end, batch.is_chosen_end.sum().astype(jnp.float32)
        gap = jax.lax.stop_gradient(chosen - rejected)
        aux = {
            "accuracy": (masking.masked_sum(jnp.where(gap == 0, 0.5, gap > 0), pairs), count),
            "reward_gap": (masking.masked_sum(gap, pairs), count),
            "reward_chosen": (masking.masked_sum(jax.lax.stop_gradient(chosen), pairs), count),
            "reward_rejected": (masking.masked_sum(jax.lax.stop_gradient(rejected), pairs), count),
        }
        total = masking.masked_sum(loss, pairs)
        if config.reads_prefixes:
            assert isinstance(batch, MarkedComparisonBatch), "the loss looks at the tokens of the responses"
            prefix, neighbor = _errors_of_prefixes(rewards, batch)
            total += 0.5 * (config.prefix_coef * prefix + config.neighbor_coef * neighbor)
            responses = 2 * count
            aux["prefix_error"] = (jax.lax.stop_gradient(prefix), responses)
            aux["neighbor_error"] = (jax.lax.stop_gradient(neighbor), responses)
        return (total, count), aux

    return loss_fn


def _errors_of_prefixes(rewards: jax.Array, batch: MarkedComparisonBatch) -> tuple[jax.Array, jax.Array]:
    """Squared errors of prefixes' scores to the whole response's, and to their neighbors': sums of a mean a response.

    Args:
      rewards: ``[B, T]`` float32, at every token.
      batch: whose rows they belong to.
    """
    is_response, width = batch.loss_mask, batch.tokens.shape[1]
    index = jnp.arange(width, dtype=jnp.int32)[None, :]
    # The states before a response's tokens, as many as it has: from that of the empty prefix on.
    is_next_same = (batch.segment_ids == jnp.roll(batch.segment_ids, -1, axis=1)) & (index < width - 1)
    is_prefix = jnp.roll(is_response, -1, axis=1) & is_next_same
    first = jax.lax.cummax(jnp.where(is_prefix & ~jnp.roll(is_prefix, 1, axis=1), index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(is_response & ~is_prefix, index, width - 1), axis=1, reverse=True)
    scores = jnp.where(is_response | is_prefix, rewards, 0.0)  # cleaned, so that nothing else reaches the gradient
    whole = jax.lax.stop_gradient(jnp.take_along_axis(scores, last, axis=1))
    weights = jnp.where(is_prefix, 1.0 / jnp.maximum(last - first, 1), 0.0)
    prefix = weights * jnp.square(scores - whole)
    neighbor = weights * jnp.square(jnp.roll(scores, -1, axis=1) - scores)
    return masking.masked_sum(prefix, is_prefix), masking.masked_sum(neighbor, is_prefix)
