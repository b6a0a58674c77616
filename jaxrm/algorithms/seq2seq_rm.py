"""Sequence MLE: the reward model learns to rewrite rejected responses into chosen ones, and to copy chosen ones."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.algorithms.train_step import LossFn
from jaxrm.ops import losses, masking, vocab
from jaxrm.types import MappingBatch


def seq2seq_rm_loss(graphdef: nnx.GraphDef, *, correction_weight: float = 1.0, identity_weight: float = 1.0) -> LossFn:
    """Loss of a seq2seq reward model on both mappings (arXiv 2409.00162, section 3).

        L = - sum_S sum_t w_S m_t log q(z_t | c, z_<t) / sum_S sum_t w_S m_t        c = template(x, y)

    with ``m = 1`` on the target response z and its EOS, and ``w_S`` the weight of the mapping that S belongs to.

    Args:
      graphdef: of the decoder.
      correction_weight: w of (x, rejected) -> chosen. The paper has no weights; these are jaxrm's choice.
      identity_weight: w of (x, chosen) -> chosen.

    Returns:
      ``loss_fn(params, MappingBatch, key)``. Aux has for each mapping ``nll_<mapping>`` (nats a token),
      ``sequence_nll_<mapping>`` (nats a response) and ``accuracy_<mapping>`` (share of target tokens that are the most
      likely one).
    """

    def loss_fn(params: Any, batch: MappingBatch, key: jax.Array) -> Any:
        del key  # no dropout
        model = nnx.merge(graphdef, params)
        hidden = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        targets, mask = losses.next_token_targets(batch.tokens, batch.segment_ids, batch.loss_mask)
        _, is_correction = losses.next_token_targets(batch.tokens, batch.segment_ids, batch.is_correction)
        # Over all rows, as models are pre-trained: it also teaches not to draw those without a token.
        token = vocab.token_statistics(
            hidden,
            model.head_embedding,
            targets,
            softcap=model.config.logit_softcap,
            forward=model.kernels.vocabulary,
        )
        right = token.argmax == targets
        is_first = mask & ~jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1]  # of each target

        aux = {}
        for name, mapping_mask in (("correction", mask & is_correction), ("identity", mask & ~is_correction)):
            nll = -masking.masked_sum(jax.lax.stop_gradient(token.log_probs), mapping_mask)
            tokens = mapping_mask.sum().astype(jnp.float32)
            aux[f"nll_{name}"] = (nll, tokens)
            aux[f"sequence_nll_{name}"] = (nll, (is_first & mapping_mask).sum().astype(jnp.float32))
            aux[f"accuracy_{name}"] = (masking.masked_sum(right, mapping_mask), tokens)
        weights = jnp.where(is_correction, correction_weight, identity_weight)
        total = masking.masked_sum(-weights * token.log_probs, mask)
        return (total, masking.masked_sum(weights, mask)), aux

    return loss_fn
