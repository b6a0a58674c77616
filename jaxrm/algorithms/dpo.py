"""Direct preference optimization: a policy learns from pairs, without a reward model and without sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.algorithms.train_step import LossFn
from jaxrm.config.fields import above, at_least, below, bounded, check, finite, place, wrong
from jaxrm.ops import losses, masking, vocab
from jaxrm.types import MarkedComparisonBatch

KINDS = ("sigmoid", "ipo")


@dataclass(frozen=True)
class DPOConfig:
    """Options of the loss.

    Attributes:
      kind: ``sigmoid`` (DPO, arXiv 2305.18290) or ``ipo`` (arXiv 2310.12036), whose log-ratios are means over the
        tokens of a response, since a squared error of sums would grow with length (jaxrm choice, and that of TRL).
      beta: how strongly the policy is held to its reference. In DPO the implicit reward is beta times the log-ratio in
        nats; in IPO 1 / (2 beta) is the difference of log-ratios that is aimed at.
      label_smoothing: chance that the labels of a pair are swapped, as conservative DPO takes it; not for ``ipo``.
      sft_coef: coefficient of the next-token loss on the chosen response, a mean over its tokens (arXiv 2404.19733).
    """

    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = bounded(0.1, above(0), finite)
    label_smoothing: float = bounded(0.0, at_least(0), below(0.5), meaning=", where labels say nothing")
    sft_coef: float = bounded(0.0, at_least(0), finite)

    def __post_init__(self) -> None:
        check(self)
        if self.label_smoothing and self.kind == "ipo":
            required = f"0.0 where {place(self, 'kind')} is ipo, which has none"
            raise wrong(self, "label_smoothing", required, 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DPOBatch(MarkedComparisonBatch):
    """Rows of pairs as for a scalar reward model, with what the reference policy says of both responses.

    Attributes:
      pair: ``[B, T]`` int32; where ``is_chosen_end`` holds, the number of the pair.
      reference_chosen: ``[B, T]`` float32; there, log pi_ref(y+ | x) in nats.
      reference_rejected: ``[B, T]`` float32; there, log pi_ref(y- | x).
    """

    pair: jax.Array
    reference_chosen: jax.Array
    reference_rejected: jax.Array


class PairLogProbs(NamedTuple):
    """What a policy says of the two responses of each pair; 0 but where ``is_chosen_end`` holds.

    Attributes:
      chosen: ``[B, T]`` float32, log pi(y+ | x) in nats.
      rejected: ``[B, T]`` float32, log pi(y- | x).
      chosen_length: ``[B, T]`` float32, tokens of y+, its end included.
      rejected_length: ``[B, T]`` float32, tokens of y-.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array


def pair_log_probs(graphdef: nnx.GraphDef) -> Callable[[Any, DPOBatch], PairLogProbs]:
    """Function from parameters and a batch to `PairLogProbs`: one forward over both responses of every pair.

    The policy and its reference go through this same function, so that they say the same as long as they are the same.

    Args:
      graphdef: of the decoder.
    """

    def log_probs(params: Any, batch: DPOBatch) -> PairLogProbs:
        model = nnx.merge(graphdef, params)
        hidden = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        targets, mask = losses.next_token_targets(batch.tokens, batch.segment_ids, batch.loss_mask)
        token = vocab.token_statistics(
            hidden,
            model.head_embedding,
            targets,
            softcap=model.config.logit_softcap,
            drawable=model.config.drawable,  # as in PPO: the policy is what is sampled
            forward=model.kernels.vocabulary,
        )
        sums = _sums_so_far(jnp.where(mask, token.log_probs, 0.0), batch.segment_ids)
        lengths = _sums_so_far(mask.astype(jnp.float32), batch.segment_ids)
        # Both sides of a pair lie in one row, so a pair never crosses devices or microbatches.
        index = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None, :]
        partner = jnp.where(batch.is_chosen_end, index + batch.rejected_offset, 0)

        def at_ends(totals: jax.Array) -> tuple[jax.Array, jax.Array]:
            rejected = jnp.take_along_axis(totals, partner, axis=1)
            return jnp.where(batch.is_chosen_end, totals, 0.0), jnp.where(batch.is_chosen_end, rejected, 0.0)

        return PairLogProbs(*at_ends(sums), *at_ends(lengths))

    return log_probs


def policy_loss(graphdef: nnx.GraphDef, config: DPOConfig = DPOConfig()) -> LossFn:
    """Loss of direct preference optimization.

        L = mean_pairs dpo_loss(log pi(y+|x) / pi_ref(y+|x), log pi(y-|x) / pi_ref(y-|x)) - sft_coef log pi(y+|x) / |y+|

    with `jaxrm.ops.losses.dpo_loss`; in ``ipo`` both log-ratios are divided by the length of their response.

    Args:
      graphdef: of the decoder.
      config: the section ``dpo``.

    Returns:
      ``loss_fn(params, DPOBatch, key)``. Aux has ``accuracy`` (share of pairs whose chosen response has the higher
      implicit reward, which is beta times the log-ratio in nats; a tie counts half), ``reward_gap`` (chosen less
      rejected), ``reward_chosen``, ``reward_rejected``, ``log_prob_chosen`` and ``log_prob_rejected`` (nats a
      response), and where there is an SFT term ``preference_loss``, which is the loss without it.
    """
    log_probs = pair_log_probs(graphdef)

    def loss_fn(params: Any, batch: DPOBatch, key: jax.Array) -> Any:
        del key  # no dropout
        policy, pairs = log_probs(params, batch), batch.is_chosen_end
        # Cleaned of what is between the ends, so that nothing of it reaches the gradient.
        chosen = jnp.where(pairs, policy.chosen - batch.reference_chosen, 0.0)
        rejected = jnp.where(pairs, policy.rejected - batch.reference_rejected, 0.0)
        chosen_length, rejected_length = (jnp.maximum(n, 1.0) for n in (policy.chosen_length, policy.rejected_length))
        ratios = (chosen / chosen_length, rejected / rejected_length) if config.kind == "ipo" else (chosen, rejected)
        preference = losses.dpo_loss(
            *ratios, beta=config.beta, label_smoothing=config.label_smoothing, kind=config.kind
        )
        loss = preference - config.sft_coef * policy.chosen / chosen_length

        count = pairs.sum().astype(jnp.float32)
        chosen, rejected = jax.lax.stop_gradient((config.beta * chosen, config.beta * rejected))
        gap = chosen - rejected
        metrics = {
            "accuracy": jnp.where(gap == 0, 0.5, gap > 0),
            "reward_gap": gap,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "log_prob_chosen": jax.lax.stop_gradient(policy.chosen),
            "log_prob_rejected": jax.lax.stop_gradient(policy.rejected),
        }
        if config.sft_coef:
            metrics["preference_loss"] = jax.lax.stop_gradient(preference)
        aux = {name: (masking.masked_sum(values, pairs), count) for name, values in metrics.items()}
        return (masking.masked_sum(loss, pairs), count), aux

    return loss_fn


def _sums_so_far(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Sum ``[B, T]`` of ``values`` from the beginning of each token's segment up to it.

    A scan that starts anew at each segment: what is subtracted from one sum over the whole row loses the digits that
    the row has taken up, and a scatter adds up in any order on some devices, so that a resumed run would differ.
    """
    starts = segment_ids != jnp.roll(segment_ids, 1, axis=1)
    starts = starts.at[:, 0].set(True)

    def join(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (sum_left, has_left), (sum_right, has_right) = left, right
        return jnp.where(has_right, sum_right, sum_left + sum_right), has_left | has_right

    return jax.lax.associative_scan(join, (values, starts), axis=1)[0]
