"""Heads that read one number from a decoder's hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.models.transformer import Decoder


class ScalarHead(nnx.Module):
    """Linear map from a hidden state to a number, in float32.

    Args:
      size: D.
      rngs: source of the initial kernel, normal with variance ``1 / (D + 1)`` as in Stiennon et al. 2020 (arXiv
        2009.01325).
    """

    def __init__(self, size: int, *, rngs: nnx.Rngs):
        kernel = (size + 1) ** -0.5 * jax.random.normal(rngs.params(), (size,))
        self.kernel = nnx.Param(kernel, logical_axes=("norm",))  # too small to be worth splitting

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Numbers ``[...]`` of ``hidden [..., D]``."""
        return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), self.kernel[...])


class ScalarModel(nnx.Module):
    """Decoder with a scalar head in place of its language head: a scalar reward model, or a critic.

    Args:
      decoder: the trunk, without a language head of its own.
      rngs: source of the scalar head.
    """

    def __init__(self, decoder: Decoder, *, rngs: nnx.Rngs):
        assert decoder.head is None, "the trunk of a scalar model has no language head"
        self.decoder = decoder
        self.scalar_head = ScalarHead(decoder.config.hidden_size, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Number ``[B, T]`` at each token, float32; arguments as for ``Decoder``."""
        return self.scalar_head(self.decoder(tokens, positions=positions, segment_ids=segment_ids))


class ActorCritic(nnx.Module):
    """Policy and critic on one trunk: a decoder with its language head, and a scalar head beside that.

    Args:
      decoder: the policy.
      rngs: source of the scalar head.
    """

    def __init__(self, decoder: Decoder, *, rngs: nnx.Rngs):
        self.decoder = decoder
        self.scalar_head = ScalarHead(decoder.config.hidden_size, rngs=rngs)


def from_decoder_params(decoder: Any, head: Any) -> Any:
    """Parameters of a ``ScalarModel`` from those of a decoder, without its language head, and of a ``ScalarHead``."""
    return frozen_trunk(decoder) | {"scalar_head": head}


def frozen_trunk(decoder: Any) -> Any:
    """The base of a ``ScalarModel`` with adapters, from that of a decoder: all but its language head."""
    return {"decoder": {name: part for name, part in decoder.items() if name != "head"}}
