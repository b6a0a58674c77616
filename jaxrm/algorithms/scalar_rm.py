"""The scalar reward model: Bradley-Terry on pairs, the baseline that the seq2seq reward model replaces."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.algorithms.train_step import LossFn
from jaxrm.config.fields import at_least, bounded, check, finite
from jaxrm.ops import losses, masking
from jaxrm.types import ComparisonBatch


@dataclass(frozen=True)
class ScalarRMConfig:
    """Options of the scalar reward model's loss.

    Attributes:
      margin: by how much the chosen response should win (Touvron et al. 2023, arXiv 2307.09288).
      l2: coefficient on the squares of the rewards, which keeps them near 0; without it the loss says nothing of their
        level.
    """

    margin: float = bounded(0.0, at_least(0), finite)
    l2: float = bounded(0.0, at_least(0), finite)

    def __post_init__(self) -> None:
        check(self)


def scalar_rm_loss(graphdef: nnx.GraphDef, config: ScalarRMConfig = ScalarRMConfig()) -> LossFn:
    """Loss of a scalar reward model (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155).

        L = mean_pairs -log sigma(r(x, y+) - r(x, y-) - margin) + l2/2 (r(x, y+)^2 + r(x, y-)^2)

    r is read from the last response token.

    Args:
      graphdef: of the `jaxrm.models.heads.ScalarModel`.
      config: ``margin`` and ``l2``.

    Returns:
      ``loss_fn(params, ComparisonBatch, key)``. Aux has ``accuracy`` (share of pairs whose chosen response has the
      higher reward; a tie counts half), ``reward_gap`` (chosen less rejected), ``reward_chosen`` and
      ``reward_rejected``.
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
        return (masking.masked_sum(loss, pairs), count), aux

    return loss_fn
