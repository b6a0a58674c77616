"""Longest common subsequences of token ids: which tokens of a response stay in another text, whatever moved."""

import chex
import jax
import jax.numpy as jnp


def kept_tokens(responses: jax.Array, mask: jax.Array, others: jax.Array, other_mask: jax.Array) -> jax.Array:
    """The tokens of each response that are in a longest common subsequence with another text.

    Of several such subsequences that one is taken whose tokens stand earliest in the response: from the last token on,
    a token is left out wherever the tokens before it have a subsequence as long.

    Memory is a table of ``4 B T (C + 1)`` bytes, and time ``2 T`` steps one after another, each over ``B C`` numbers.

    Args:
      responses: ``[B, T]`` int token ids.
      mask: ``[B, T]`` bool, True on response tokens.
      others: ``[B, C]`` int token ids of the texts that they are compared with.
      other_mask: ``[B, C]`` bool, True on their tokens.

    Returns:
      ``[B, T]`` bool, True on the tokens that are kept; False outside the mask.
    """
    for ids, real in ((responses, mask), (others, other_mask)):
        chex.assert_rank(ids, 2)
        chex.assert_equal_shape([ids, real])
        chex.assert_type([ids, real], [int, bool])
    B, C = others.shape
    columns = jnp.arange(1, C + 1, dtype=jnp.int32)[None, :]

    def matches(token: tuple[jax.Array, jax.Array]) -> jax.Array:
        ids, is_real = token
        return (others == ids[:, None]) & other_mask & is_real[:, None]

    def longer(before: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Lengths ``[B, C + 1]`` with a token more, by how many tokens of the other text may be used; and before it."""
        with_token = jnp.where(matches(token), before[:, :-1] + 1, before[:, 1:])
        lengths = jax.lax.cummax(jnp.maximum(with_token, before[:, 1:]), axis=1)
        after = jnp.concatenate([before[:, :1], lengths], axis=1)
        return after, before

    def choose(
        later: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """How much of the other text is left ``[B]``, and the lengths, before a token; and whether it is kept."""
        (column, after), (ids, is_real, before) = later, token
        reached, without = (jnp.take_along_axis(x, column[:, None], axis=1)[:, 0] for x in (after, before))
        is_kept = reached > without
        # Its last partner leaves most to the tokens before it.
        usable = matches((ids, is_real)) & (columns <= column[:, None])
        partner = jnp.max(jnp.where(usable, columns, 0), axis=1)
        return (jnp.where(is_kept, partner - 1, column), before), is_kept

    none = jnp.zeros((B, C + 1), jnp.int32)
    tokens = responses.T, mask.T
    last, table = jax.lax.scan(longer, none, tokens)
    _, stays = jax.lax.scan(choose, (jnp.full((B,), C, jnp.int32), last), (*tokens, table), reverse=True)
    return stays.T & mask
