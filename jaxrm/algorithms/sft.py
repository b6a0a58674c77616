"""Supervised fine-tuning: the next-token loss on responses."""

from typing import Any

import jax
from flax import nnx

from jaxrm.algorithms.train_step import LossFn
from jaxrm.ops import losses, masking, vocab
from jaxrm.types import TokenBatch


def sft_loss(graphdef: nnx.GraphDef) -> LossFn:
    """Loss of supervised fine-tuning.

        L = - sum_t m_t log pi(z_t | z_<t) / sum_t m_t        m = 1 on response tokens and their EOS

    Args:
      graphdef: of the decoder.

    Returns:
      ``loss_fn(params, TokenBatch, key)``; aux has the token ``accuracy`` and ``entropy`` (nats a token).
    """

    def loss_fn(params: Any, batch: TokenBatch, key: jax.Array) -> Any:
        del key  # no dropout
        model = nnx.merge(graphdef, params)
        hidden = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        targets, mask = losses.next_token_targets(batch.tokens, batch.segment_ids, batch.loss_mask)
        # Over all rows, as models are pre-trained: it also teaches not to draw those without a token.
        token = vocab.token_statistics(
            hidden,
            model.head_embedding,
            targets,
            softcap=model.config.logit_softcap,
            forward=model.kernels.vocabulary,
        )
        weight = mask.sum().astype("float32")
        aux = {
            "accuracy": (masking.masked_sum(token.argmax == targets, mask), weight),
            "entropy": (masking.masked_sum(jax.lax.stop_gradient(token.entropy), mask), weight),
        }
        return (-masking.masked_sum(token.log_probs, mask), weight), aux

    return loss_fn
