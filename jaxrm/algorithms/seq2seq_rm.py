"""Sequence MLE: the reward model learns to rewrite rejected responses into chosen ones, and to copy chosen ones."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.algorithms.train_step import LossFn
from jaxrm.errors import UserError
from jaxrm.ops import losses, masking, vocab
from jaxrm.types import MappingBatch, MarkedMappingBatch


def seq2seq_rm_loss(
    graphdef: nnx.GraphDef,
    *,
    correction_weight: float = 1.0,
    identity_weight: float = 1.0,
    edit_weight: float = 1.0,
) -> LossFn:
    """Loss of a seq2seq reward model on both mappings (arXiv 2409.00162, section 3).

        L = - sum_S sum_t w_S e_t m_t log q(z_t | c, z_<t) / sum_S sum_t w_S e_t m_t        c = template(x, y)

    with ``m = 1`` on the target response z and its EOS, ``w_S`` the weight of the mapping that S belongs to, and
    ``e_t`` that of an edit, 1 elsewhere. The divisor has the same weights, so they change no learning rate.

    Args:
      graphdef: of the decoder.
      correction_weight: w of (x, rejected) -> chosen. The paper has no weights; these are jaxrm's choice.
      identity_weight: w of (x, chosen) -> chosen.
      edit_weight: e of a correction's tokens that are not copied from y. With another one than 1, batches are those of
        `jaxrm.types.MarkedMappingBatch`.

    Returns:
      ``loss_fn(params, MappingBatch, key)``. Aux has for each mapping ``nll_<mapping>`` (nats a token),
      ``sequence_nll_<mapping>`` (nats a response) and ``accuracy_<mapping>`` (share of target tokens that are the most
      likely one). Where edits are marked, ``nll_edit`` and ``accuracy_edit`` are those of edits alone.
    """

    def loss_fn(params: Any, batch: MappingBatch, key: jax.Array) -> Any:
        del key  # no dropout
        if edit_weight != 1 and not isinstance(batch, MarkedMappingBatch):
            raise UserError(
                f"edit_weight is {edit_weight}, but these batches do not say which tokens are edits; give those of "
                "jaxrm.pairs, or edit_weight=1"
            )
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

        weights = jnp.where(is_correction, correction_weight, identity_weight)
        masks = {"correction": mask & is_correction, "identity": mask & ~is_correction}
        if isinstance(batch, MarkedMappingBatch):
            _, masks["edit"] = losses.next_token_targets(batch.tokens, batch.segment_ids, batch.is_edit)
            weights = jnp.where(masks["edit"], edit_weight * weights, weights)

        aux = {}
        for name, counted in masks.items():
            nll = -masking.masked_sum(jax.lax.stop_gradient(token.log_probs), counted)
            tokens = counted.sum().astype(jnp.float32)
            aux[f"nll_{name}"] = (nll, tokens)
            aux[f"accuracy_{name}"] = (masking.masked_sum(right, counted), tokens)
            if name != "edit":
                aux[f"sequence_nll_{name}"] = (nll, (is_first & counted).sum().astype(jnp.float32))
        total = masking.masked_sum(-weights * token.log_probs, mask)
        return (total, masking.masked_sum(weights, mask)), aux

    return loss_fn
