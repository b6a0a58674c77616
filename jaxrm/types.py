"""The frozen pytrees that travel, and the time index they share.

Arrays over a row are ``[B, T]`` and indexed by the token itself: ``loss_mask[:, t]`` says whether token ``t`` is a
trained target, and a log-prob at ``t`` is that of token ``t`` given the tokens before it. Hidden state ``i`` scores
token ``i + 1``; `jaxrm.ops.losses.next_token_targets` is where the two meet.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Rows of token ids, each holding one or more packed examples.

    Attributes:
      tokens: ``[B, T]`` int32 token ids.
      segment_ids: ``[B, T]`` int32; 1, 2, ... number the examples of a row, 0 is padding.
      positions: ``[B, T]`` int32, counted from 0 in each segment.
      loss_mask: ``[B, T]`` bool, True on trained tokens.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    loss_mask: jax.Array
