"""The frozen pytrees that pass between floors, and the time index that they share.

Arrays over a row are ``[B, T]`` and indexed by the token itself. ``loss_mask[:, t]`` is True where token ``t`` is a
target. A log-prob at ``t`` is that of token ``t`` given the tokens before it. Hidden state ``i`` scores token
``i + 1``; ``jaxrm.ops.losses.next_token_targets`` aligns the two.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MappingBatch(TokenBatch):
    """Rows of mappings ``prompt, source response, request, target response`` for a seq2seq RM.

    Attributes:
      is_correction: ``[B, T]`` bool, True on the target of a correction mapping, whose source is a rejected response.
        The other targets belong to identity mappings.
    """

    is_correction: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MarkedMappingBatch(MappingBatch):
    """The same, for losses in which edits weigh otherwise than what is copied.

    Attributes:
      is_edit: ``[B, T]`` bool, True on the targets of a correction mapping that are not copied from its source.
    """

    is_edit: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ComparisonBatch:
    """Rows of pairs for a scalar RM: two segments a pair, ``prompt, chosen`` and then ``prompt, rejected``.

    Attributes:
      tokens: ``[B, T]`` int32 token ids.
      segment_ids: ``[B, T]`` int32; 1, 2, ... number the sides of a row's pairs, 0 is padding.
      positions: ``[B, T]`` int32, counted from 0 in each segment.
      is_chosen_end: ``[B, T]`` bool, True on the last token of a chosen response.
      rejected_offset: ``[B, T]`` int32; at those tokens, the distance to the last token of the rejected response.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    is_chosen_end: jax.Array
    rejected_offset: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MarkedComparisonBatch(ComparisonBatch):
    """The same, for losses that also look at the tokens of the responses.

    Attributes:
      loss_mask: ``[B, T]`` bool, True on the tokens of both responses.
    """

    loss_mask: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowPacking:
    """How the prompts of a `ResponseBatch` with their responses share rows, from `jaxrm.algorithms.row_packing`.

    The rows of a batch are S runs of B / S. Each is packed by itself, into as many rows of one width, so that no row
    leaves its device.

    Attributes:
      starts: ``[B]`` int32; where each prompt begins, counted in tokens through the packed rows of its run, which are
        put end to end.
      num_shares: S.
      num_rows: packed rows of a run.
      num_tokens: room for the response tokens of a run, side by side.
    """

    starts: jax.Array
    num_shares: int = dataclasses.field(metadata={"static": True})
    num_rows: int = dataclasses.field(metadata={"static": True})
    num_tokens: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResponseBatch:
    """Prompts and a response to each, as a policy emits them.

    A prompt has at least one token, which predicts the first of the response. A response of no token is legal.

    Attributes:
      prompts: ``[B, P]`` int32 token ids, padded on the left.
      prompt_mask: ``[B, P]`` bool, False on padding.
      responses: ``[B, T]`` int32 token ids, padded on the right.
      response_mask: ``[B, T]`` bool, True on response tokens, an emitted EOS included.
      packing: how they share rows where a policy or a critic reads them; None gives each a row of its own.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    responses: jax.Array
    response_mask: jax.Array
    packing: RowPacking | None = dataclasses.field(default=None, kw_only=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecordedBatch(ResponseBatch):
    """The same, with the record that each prompt was read from, for rewards that look at its fields.

    Several records may have one prompt.

    Attributes:
      records: ``[B]`` int32, the number of each row's record (`jaxrm.data.prompts.PromptExample.number`).
    """

    records: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRewards:
    """Token rewards, as every source of rewards returns them.

    Attributes:
      rewards: ``[B, T]`` float32 reward of each response token, 0 outside the mask.
      values: ``[B, T]`` float32, the same before scale and center.
      tags: ``[B, T]`` bool, True on tokens that the reward model would have written too. Those of a scalar reward
        model are all True.
      mask: ``[B, T]`` bool, True on response tokens.
      diagnostics: ``[B]`` float32 by name, for the logs: ``sum`` and ``mean`` of the rewards, ``length`` in tokens,
        ``tag_rate`` (share of + tags), ``divergence`` (index of the first - tag), ``ended`` (1 where the response has
        an end token, 0 where it was truncated) and ``end_tag`` (1 where that token has tag +).
      parts: of a sum, the token rewards of each source by name, calibrated and not weighted; ``{}`` of one source.
    """

    rewards: jax.Array
    values: jax.Array
    tags: jax.Array
    mask: jax.Array
    diagnostics: dict[str, jax.Array]
    parts: dict[str, "TokenRewards"] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Responses of a policy with the log-probs, values, advantages and returns of their tokens.

    Arrays are ``[B, T]`` float32 and 0 outside the response mask.

    Attributes:
      responses: prompts and responses.
      log_probs: log pi_old(y_t | x, y_<t), recomputed by the training forward.
      reference_log_probs: log pi_ref(y_t | x, y_<t).
      values: V_old of the state before y_t; None where there is no critic.
      advantages: A_t.
      returns: G_t = A_t + V_old; None where there is no critic.
      sampler_log_probs: those that the tokens were drawn with; None where the loss is not weighed by them.
    """

    responses: ResponseBatch
    log_probs: jax.Array
    reference_log_probs: jax.Array
    values: jax.Array | None
    advantages: jax.Array
    returns: jax.Array | None
    sampler_log_probs: jax.Array | None = None
